"""`rbee key` with everything that a key can allow, here and as it is said to another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rbee.cli import key as verbs
from rbee.cli.main import main

OPTIONS = {
    "--tenant": ("acme", "tenant", "acme"),
    "--tier": ("gold", "tier", "gold"),
    "--priority": ("batch", "priority", "batch"),
    "--requests-per-minute": ("1", "requests_per_minute", 1),
    "--tokens-per-minute": ("2", "tokens_per_minute", 2),
    "--concurrency": ("3", "concurrency", 3),
    "--requests-per-day": ("4", "requests_per_day", 4),
    "--tokens-per-day": ("5", "tokens_per_day", 5),
    "--requests-per-month": ("6", "requests_per_month", 6),
    "--tokens-per-month": ("7", "tokens_per_month", 7),
}
WORDS = [word for option, (value, _, _) in OPTIONS.items() for word in (option, value)]
MODELS = ["--model", "qwen*", "--model", "echo", "--scope", "inference", "--scope", "metrics"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RBEE_HOME", str(tmp_path))
    monkeypatch.delenv("RBEE_URL", raising=False)
    return tmp_path


def rbee(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["rbee", *words])
    code = main()
    out = capfd.readouterr()
    return code, out.out, out.err


class Shell:
    """Types commands."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def __call__(self, *words: str) -> tuple[int, str, str]:
        return rbee(self._capfd, self._monkeypatch, "key", *words)

    def facts(self) -> dict[str, Any]:
        [facts] = json.loads(self("list", "--json")[1])
        return dict(facts)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(capfd, monkeypatch)


def test_every_option_is_kept_and_shown(shell: Shell) -> None:
    assert shell("create", "acme", *WORDS, *MODELS, "-q")[0] == 0
    facts = shell.facts()
    assert {name: facts[name] for _, name, _ in OPTIONS.values()} == {n: v for _, n, v in OPTIONS.values()}
    assert facts["models"] == ["qwen*", "echo"]
    assert facts["scopes"] == ["inference", "metrics"]
    code, shown, _ = shell("show", facts["id"])
    assert code == 0
    assert all(str(value) in shown for _, _, value in OPTIONS.values())
    assert json.loads(shell("show", facts["id"], "--json")[1]) == facts


def test_set_changes_what_it_names(shell: Shell) -> None:
    shell("create", "k", "--tenant", "acme", "--expires", "3")
    before = shell.facts()
    for option, (value, name, kept) in OPTIONS.items():
        assert shell("set", before["id"], option, value)[0] == 0
        before[name] = kept
        assert shell.facts() == before
    assert shell("set", before["id"], "--expires", "0", "--model", "*", "--requests-per-day", "0")[0] == 0
    assert shell.facts() == {**before, "expires_at": None, "models": ["*"], "requests_per_day": 0}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("set", "ID"), 2),
        (("set", "unknown", "--tier", "x"), 4),
        (("show", "unknown"), 4),
        (("set", "ID", "--tenant", "a b"), 2),
        (("set", "ID", "--requests-per-day", "-1"), 2),
        (("create", "x", "--priority", "urgent"), 2),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(shell: Shell, words: tuple[str, ...], code: int) -> None:
    shell("create", "k")
    before = shell.facts()
    done, out, err = shell(*(before["id"] if word == "ID" else word for word in words))
    assert (done, out) == (code, "")
    assert "Traceback" not in err
    assert shell.facts() == before


@pytest.mark.parametrize("verb", [("create", "acme"), ("set", "1a2B3c4D")])
def test_another_machine_is_told_the_same(
    shell: Shell, verb: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[list[str]] = []

    def there(name: str, folder: Path | None, words: list[str]) -> int:
        told.append(words)
        return 0

    monkeypatch.setattr(verbs, "_there", there)
    assert shell(*verb, "--expires", "2", *WORDS, *MODELS, "--host", "queen-1")[0] == 0
    [words] = told
    monkeypatch.undo()
    monkeypatch.setenv("RBEE_HOME", str(tmp_path))
    if verb[0] == "create":
        assert shell(*words)[0] == 0
        facts = shell.facts()
        assert {name: facts[name] for _, name, _ in OPTIONS.values()} == {n: v for _, n, v in OPTIONS.values()}
        assert (facts["models"], facts["name"]) == (["qwen*", "echo"], "acme")
    else:
        shell("create", "k")
        own = shell.facts()["id"]
        assert shell(*words[:-1], own)[0] == 0
        assert shell.facts()["tokens_per_month"] == 7


def test_a_whole_key_may_stand_for_its_id(shell: Shell) -> None:
    secret = shell("create", "leaked", "-q")[1].strip()
    assert shell("revoke", secret)[0] == 0
    assert shell.facts()["state"] == "revoked"
    code, out, _ = shell("show", secret)
    assert (code, secret in out) == (0, False)


def test_a_revoked_key_is_not_changed_and_says_so(shell: Shell) -> None:
    shell("create", "gone", "-q")
    key_id = shell.facts()["id"]
    shell("revoke", key_id)
    code, _, err = shell("set", key_id, "--expires", "3")
    assert code == 2
    assert "is revoked" in err
    assert shell.facts()["expires_at"] is None


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "x" * 101, "\x1b[31mred"])
def test_a_name_that_would_spoil_a_list_is_refused(shell: Shell, name: str) -> None:
    code, out, err = shell("create", name)
    assert (code, out) == (2, "")
    assert "name" in err
    assert json.loads(shell("list", "--json")[1]) == []


def test_what_a_table_shows_is_not_mistaken(shell: Shell) -> None:
    code, _, err = shell("list")
    assert (code, "rbee key create" in err) == (0, True)
    shell("create", "free", "-q")
    lines = shell("show", shell.facts()["id"])[1].splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert lines[0].split() == ["FIELD", "VALUE"]
    assert told["tokens_per_day"] == "no limit"
    assert told["models"] == "every one"
    code, _, err = shell("create", "x", "--tenant", "a b")
    assert code == 2
    assert "regex" not in err
    assert "'a b' is no tenant" in err
