"""Random ssh_config files: what people write, in every spelling that OpenSSH takes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

NAMES = ("alpha", "alpha-2", "beta", "Beta", "gamma.lan", "10.0.0.7", "delta")
PATTERNS = (*NAMES, "*", "a*", "*a", "?eta", "alpha*", "10.0.0.?", "g*.lan", "*-*", "b**", "a?????2", "no-such")
USERS = ("root", "vince", "rbee")
SCALARS: dict[str, tuple[str, ...]] = {
    "HostName": ("h.example", "10.1.2.3", "%h", "%h.lan", "A.Example", "x-%h", "a%%b", "gamma.lan"),
    "User": USERS,
    "Port": ("22", "2222", "7", "65535"),
    "ConnectTimeout": ("5", "30", "10"),
    "ServerAliveInterval": ("5", "9"),
    "Compression": ("yes", "no"),
    "VisualHostKey": ("yes", "no"),
    "IdentitiesOnly": ("yes", "no"),
    "HostKeyAlias": ("one", "two", "a b"),
    "BindAddress": ("10.0.0.1", "10.0.0.2"),
    "NumberOfPasswordPrompts": ("1", "2"),
}
LISTS: dict[str, tuple[str, ...]] = {
    "IdentityFile": ("/k/one", "/k/two", "/k/with space", "~/three", "/k/back\\slash"),
    "CertificateFile": ("/c/one", "/c/two", "/c/it's"),
}
OURS = ('Worker chat model=m "quoted word" # comment', "HivePort 7835", "Model m source=file:m.gguf", "tags=a b",
        "RbeeWave\t1", "hiveport=7000")  # fmt: skip
IGNORE = "IgnoreUnknown Hive*,Worker*,Model*,Tags,Rbee*"
WRONG = ('User "open', "Port", "Host", "Match", "Match host", "Match nothing x", "Match all host x",
         "Match host=a all b",
         "User 'open", "Include", "IdentityFile \"\"x\"", "Compression=", "\f")  # fmt: skip


class Writer:
    """Writes one main file, and files that it includes, into a folder."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.pick = random.Random(seed)
        self.folder = folder
        self.files = 0

    def write(self) -> Path:
        """Return the main file."""
        return self._file([IGNORE, *self._blocks(depth=0)])

    def _file(self, lines: list[str]) -> Path:
        self.files += 1
        path = self.folder / f"{self.files} file.conf"
        end = self.pick.choice(("\n", "\n", "\n", "\r\n"))
        text = end.join(lines) + self.pick.choice((end, ""))
        path.write_bytes(text.encode())
        # ssh refuses to include what others may write.
        path.chmod(0o600)
        return path

    def _blocks(self, depth: int) -> list[str]:
        lines = self._lines(depth)
        for _ in range(self.pick.randint(1, 5)):
            lines += [self._head(), *self._lines(depth)]
        return lines

    def _head(self) -> str:
        if self.pick.random() < 0.6:
            words = [self._negated(self.pick.choice(PATTERNS)) for _ in range(self.pick.randint(1, 3))]
            return self._spelled("Host", words)
        return self._match()

    def _match(self) -> str:
        if self.pick.random() < 0.15:
            return self._cased("Match") + self.pick.choice((" all", " All", " !all", " all # why", " final all"))
        parts = [self._criterion() for _ in range(self.pick.randint(1, 3))]
        return f"{self._cased('Match')} {' '.join(parts)}"

    def _criterion(self) -> str:
        make: Callable[[], str] = self.pick.choice(
            (
                lambda: self._pair("host", self._list((*NAMES, "h.example", "*.lan", "10.*", "*"))),
                lambda: self._pair("originalhost", self._list(PATTERNS)),
                lambda: self._pair("user", self._list((*USERS, "v*"))),
                lambda: self._pair("localuser", self._list((*USERS, "*"))),
                lambda: self.pick.choice(("final", "canonical", "Final")),
                lambda: f'exec "{self.pick.choice(EXECS)}"',
            )
        )
        return self._negated(make(), 0.2)

    def _pair(self, name: str, value: str) -> str:
        return self._cased(name) + self.pick.choice((" ", "=")) + value

    def _list(self, words: tuple[str, ...]) -> str:
        return ",".join(self._negated(self.pick.choice(words)) for _ in range(self.pick.randint(1, 3)))

    def _negated(self, word: str, chance: float = 0.15) -> str:
        return "!" + word if self.pick.random() < chance else word

    def _lines(self, depth: int) -> list[str]:
        return [self._line(depth) for _ in range(self.pick.randint(0, 4))]

    def _line(self, depth: int) -> str:
        chance = self.pick.random()
        if chance < 0.12:
            return self.pick.choice(("", "   ", "# a comment", '  # an "odd one', "\t#Host x"))
        if chance < 0.24:
            return self._indented(self.pick.choice(OURS))
        if chance < 0.34 and depth < 2 and self.files < 6:
            return self._include(depth)
        if chance > 0.997:
            return self.pick.choice(WRONG)
        table = SCALARS if self.pick.random() < 0.75 else LISTS
        keyword = self.pick.choice(sorted(table))
        return self._indented(self._spelled(keyword, [self.pick.choice(table[keyword])]))

    def _include(self, depth: int) -> str:
        paths = [self._file(self._blocks(depth + 1)) for _ in range(self.pick.randint(1, 2))]
        words = [str(path) for path in paths]
        if self.pick.random() < 0.2:
            words.append(str(self.folder / "none*.conf"))
        return self._indented(self._spelled("Include", words))

    def _indented(self, line: str) -> str:
        return (
            self.pick.choice(("", "  ", "\t", "    ")) + line + self.pick.choice(("", "", " ", "\t", "  # said", "\f"))
        )

    def _spelled(self, keyword: str, words: list[str]) -> str:
        between = self.pick.choice((" ", " ", " ", "\t", "  ", "=", " = ", " =", "= "))
        written = self.pick.choice((" ", "  ", "\t")).join(self._quoted(word) for word in words)
        return f"{self._cased(keyword)}{between}{written}"

    def _quoted(self, word: str) -> str:
        freed = word.replace("\\", "\\\\").replace("'", "\\'")
        if " " in word:
            return self.pick.choice((f'"{freed}"', f"'{freed}'", freed.replace(" ", "\\ "), freed.replace(" ", '" "')))
        return self.pick.choice((freed, freed, freed, f'"{freed}"', f"'{freed}'", f'"{freed[:2]}"{freed[2:]}'))

    def _cased(self, word: str) -> str:
        return self.pick.choice((word, word, word.lower(), word.upper()))


EXECS = ("true", "false", "test %h = alpha", "test %n = beta", "test %p = 2222", "test %r = vince", "test %u = root",
         "test 100%% = '100%%'", "test -n '%C'", "test %k = one", "test -d %d")  # fmt: skip
