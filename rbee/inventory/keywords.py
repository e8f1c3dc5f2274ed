"""rbee's own keywords: the one table that parser, defaults, `rbee inventory keywords` and docs/inventory.md share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from rbee.inventory import values
from rbee.inventory.openssh_keywords import CURRENT
from rbee.inventory.values import Kind

IGNORE_UNKNOWN = "Hive*,Queen*,Worker*,Model*,Gpu*,Region*,Tags,Rbee*"
"""What `IgnoreUnknown` must name so that ssh passes over rbee's keywords.

`Tags` stands whole: OpenSSH 9.4 has a keyword `Tag`, and none of these may ever hide one of ssh's.
"""


class Key(Struct, frozen=True):
    """A `key=value` of a line; `field` is where its value is kept."""

    name: str
    field: str
    kind: Kind
    help: str
    required: bool = False


class Keyword(Struct, frozen=True, kw_only=True):
    """One keyword: its words are of `kind`, or, with `keys`, a name and `key=value` words.

    `field` is the field of `Host` that keeps it. One that `repeats` adds up; of the others the first value stays.
    """

    name: str
    field: str
    help: str
    default: str = ""
    kind: Kind
    many: bool = False
    """Whether it takes several words."""
    repeats: bool = False
    keys: tuple[Key, ...] = ()
    named: bool = False
    """Whether a name stands before the keys."""
    other_keys: bool = False
    """Whether keys that are not in the table are kept, as options of the engine."""
    example: str

    @property
    def usage(self) -> str:
        """The line, as a person writes it."""
        if not self.keys:
            return f"{self.name} {self.kind.usage}{'…' if self.many else ''}"
        keys = " ".join(
            f"{key.name}={key.kind.usage}" if key.required else f"[{key.name}={key.kind.usage}]" for key in self.keys
        )
        more = " [OPTION=VALUE…]" if self.other_keys else ""
        return f"{self.name} {self.kind.usage + ' ' if self.named else ''}{keys}{more}"


WORKER_KEYS = (
    Key("model", "model", values.NAME, "The model that it serves: the name of a `Model` line, or `rbee-demo`.", True),
    Key("backend", "backend", values.WORD, "The engine (default: the best one for the model's format)."),
    Key("device", "device", values.WORD, "cpu, cuda, rocm or metal (default: the engine chooses)."),
    Key("gpu", "gpus", values.GPUS, "The GPUs that it may use, by number, or cpu (default: the engine chooses)."),
    Key("port", "port", values.PORT, "Its port (default: the first free one from 8001 on, in the order of the lines)."),
    Key("ctx", "context_tokens", values.COUNT, "Tokens of context for each slot (default: the engine's)."),
    Key("slots", "slots", values.COUNT, "How many jobs it runs side by side (default: the engine's; with url 8)."),
    Key("threads", "threads", values.COUNT, "CPU threads (default: the engine's)."),
    Key("pin", "pin", values.FLAG, "Keep it loaded, whatever else needs memory (default: no)."),
    Key("idle", "idle_s", values.TIME, "Unload the model after so long without a job (default: never)."),
    Key("start-limit", "start_limit_s", values.TIME, "How long loading may take (default: the hive's limit)."),
    Key("memory", "memory_bytes", values.SIZE, "The most memory that it may use (default: no limit)."),
    Key("url", "url", values.URL, "Any OpenAI-compatible server, which rbee neither starts nor stops."),
    Key("key-file", "key_file", values.PATH, "With url: the file of its API key, here or on the queen's machine."),
    Key("upstream-model", "upstream_model", values.UPSTREAM_MODEL, "With url: the model's name there, if another."),
    Key(
        "capabilities",
        "capabilities",
        values.CAPABILITIES,
        "With url: what it can do (default: chat,completion,embedding).",
    ),
)
MODEL_KEYS = (
    Key("source", "source", values.SOURCE, "file:PATH (relative to this file), https://ADDRESS or hf:OWNER/NAME/FILE.",
        True),
    Key("sha256", "sha256", values.SHA256, "The file's SHA-256; another file is refused."),
)  # fmt: skip
GITOPS_KEYS = (
    Key("repo", "repository", values.REPOSITORY, "The git repository that holds the inventory.", True),
    Key("branch", "branch", values.BRANCH, "Its branch (default: main)."),
    Key("path", "path", values.PATH, "The inventory's folder in it (default: inventory)."),
    Key("interval", "interval_s", values.TIME, "How often to look (default: 60s)."),
    Key("require-signed", "require_signed", values.FLAG, "Apply only commits with a trusted signature (default: no)."),
    Key("key", "key_file", values.PATH, "The private key that it reaches the machines and the repository with."),
)

KEYWORDS = (
    Keyword(
        name="HivePort", field="hive_port", kind=values.PORT_OR_NONE, default="7835", example="HivePort 7835",
        help="The port of the hive on this machine. `none`: no hive runs here, as on a jump host.",
    ),
    Keyword(
        name="QueenPort", field="queen_port", kind=values.PORT_OR_NONE, default="none", example="QueenPort 7833",
        help="The queen runs on this machine, on this port. One machine of the fleet has it.",
    ),
    Keyword(
        name="Worker", field="workers", kind=values.WORKER_NAME, repeats=True, named=True, keys=WORKER_KEYS,
        other_keys=True, example="Worker chat model=qwen2.5-7b gpu=0 ctx=8192 slots=4",
        help="One worker: one process that serves one model. Keys that are not listed are options of its engine.",
    ),
    Keyword(
        name="Model", field="models", kind=values.NAME, repeats=True, named=True, keys=MODEL_KEYS,
        example="Model qwen2.5-7b source=file:models/qwen2.5-7b-q4_k_m.gguf",
        help="A model that workers of this machine may name, and where its file comes from.",
    ),
    Keyword(
        name="Gpu", field="gpus", kind=values.WORD, repeats=True, many=True, example="Gpu 0 cuda 24G",
        help="A GPU of this machine: its number, its kind, its memory and, if you like, its type, as in "
        "`Gpu 0 cuda 24G RTX4090`; the routing script sees the type that the machine reports otherwise. Workers may "
        "name only GPUs that are listed, once one is.",
    ),
    Keyword(
        name="Region", field="region", kind=values.WORD, example="Region eu",
        help="Where the machine stands; the routing script sees it.",
    ),
    Keyword(
        name="Tags", field="tags", kind=values.WORD, many=True, example="Tags fast quiet",
        help="Words of your own about the machine; the routing script sees them.",
    ),
    Keyword(
        name="RbeePrice", field="price", kind=values.PRICE, default="0", example="RbeePrice 0.35",
        help="What an hour of this machine costs, in a currency of your own; the routing script sees it.",
    ),
    Keyword(
        name="RbeeTenant", field="tenant", kind=values.WORD, example="RbeeTenant acme",
        help="Only jobs of this tenant's keys run on the machine, whatever the routing script says.",
    ),
    Keyword(
        name="RbeeWave", field="wave", kind=values.WAVE, default="0", example="RbeeWave 1",
        help="`rbee apply` finishes the machines of a lower wave first, and stops when too many of them fail.",
    ),
    Keyword(
        name="RbeePython", field="python", kind=values.PROGRAM, default="python3", example="RbeePython python3.12",
        help="The Python on the machine that runs rbee: 3.11 or newer.",
    ),
    Keyword(
        name="RbeeUser", field="run_as", kind=values.SYSTEM_USER, default="rbee", example="RbeeUser rbee",
        help="The system user that hive and queen run as; it is made when missing.",
    ),
    Keyword(
        name="RbeeGitops", field="gitops", kind=values.NAME, keys=GITOPS_KEYS,
        example="RbeeGitops repo=git@example.org:fleet.git interval=60s",
        help="On the queen's machine: keep the fleet as this repository says.",
    ),
)  # fmt: skip

BY_NAME = {keyword.name.lower(): keyword for keyword in KEYWORDS}


def nearest_keyword(word: str) -> str:
    """Return the keyword that was most likely meant, or nothing."""
    return nearest(word, [*(keyword.name for keyword in KEYWORDS), *CURRENT])


def nearest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """Return the known word that is most like this one, or nothing; case does not count."""
    import difflib

    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else ""


def as_data() -> list[dict[str, Any]]:
    """Return the table as plain values, for JSON."""
    return [
        {
            "keyword": keyword.name,
            "usage": keyword.usage,
            "help": keyword.help,
            "default": keyword.default,
            "repeats": keyword.repeats,
            "example": keyword.example,
            "keys": [
                {"key": key.name, "value": key.kind.usage, "help": key.help, "required": key.required}
                for key in keyword.keys
            ],
        }
        for keyword in KEYWORDS
    ]
