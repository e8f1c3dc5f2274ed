"""Turns the compact wordings of the text files into many concrete questions.

`[a|b]` is one of, `[a|]` is maybe, `<name>` is a macro, `{name}` is a slot. Slots named word, Word, number and name are
invented on the spot, so that the network learns to copy them instead of remembering them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_MACRO = re.compile(r"<(\w+)>")
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "cl", "dr", "fl", "gr", "kr", "pl", "sh", "st", "th", "tr", "qu")
_VOWELS = (*"aeiouaeio", "ai", "ea", "ou", "io")
_CODAS = ("", "", "", *"nrlstm", "ck", "nd", "st", "x")
_FIRST_NAMES = (
    "Alice",
    "Bob",
    "Carol",
    "Dave",
    "Eve",
    "Vince",
    "Anna",
    "Peter",
    "Maria",
    "John",
    "Mary",
    "Omar",
    "Yuki",
)
_FILLERS = frozenset(
    {
        "a",
        "an",
        "the",
        "do",
        "does",
        "i",
        "is",
        "are",
        "my",
        "me",
        "to",
        "of",
        "can",
        "how",
        "you",
        "what",
        "in",
        "on",
        "for",
        "it",
    }
)
"""Words that are left out when someone asks in keywords."""


def invented_word(rng: random.Random) -> str:
    """Make up a lower-case word of one to three syllables."""
    syllables = rng.choices([1, 2, 3], [2, 5, 2])[0]
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def number(rng: random.Random) -> str:
    """Pick a whole number of one to four digits."""
    return str(rng.randrange(10 ** rng.choices([1, 2, 3, 4], [4, 4, 2, 1])[0]))


def name(rng: random.Random) -> str:
    """Pick or invent a person's name."""
    return rng.choice(_FIRST_NAMES) if rng.random() < 0.4 else invented_word(rng).capitalize()


def expand(template: str, rng: random.Random, macros: Mapping[str, str] | None = None) -> str:
    """Choose among the alternatives of `template`, leaving `{slots}` alone."""
    text = _MACRO.sub(lambda match: (macros or {})[match[1]], template)
    while (match := _INNERMOST.search(text)) is not None:
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    return re.sub(r"  +", " ", text).strip()


def fill(template: str, rng: random.Random, slots: Mapping[str, Sequence[str]]) -> str:
    """Replace every `{slot}`, those inside the replacements too. Raises KeyError for an unknown one."""
    text = template
    while (match := _SLOT.search(text)) is not None:
        text = text[: match.start()] + _slot_value(match[1], rng, slots) + text[match.end() :]
    return text


def as_typed(text: str, rng: random.Random, *, about_rbee: bool = False) -> str:
    """Vary a question as people type: case, punctuation, courtesy, slips of the finger."""
    text = _with_ending(text, rng)
    if about_rbee and rng.random() < 0.06:
        text = " ".join(word for word in text.split() if word.lower().strip("?") not in _FILLERS) or text
    if about_rbee and rng.random() < 0.07 and "rbee" not in text:
        text = text.rstrip("?.") + rng.choice([" in rbee", " with rbee", " on rbee"]) + rng.choice(["", "?"])
    text = _with_courtesy(text, rng)
    text = _with_case(text, rng)
    for _ in range(rng.choices([0, 1, 2], [80, 15, 5])[0]):
        text = _with_slip(text, rng)
    return text


def _slot_value(slot: str, rng: random.Random, slots: Mapping[str, Sequence[str]]) -> str:
    if slot in slots:
        return rng.choice(slots[slot])
    match slot:
        case "word":
            return invented_word(rng)
        case "Word":
            return invented_word(rng).capitalize()
        case "number":
            return number(rng)
        case "name":
            return name(rng)
    raise KeyError(f"unknown slot {{{slot}}}")


def _with_ending(text: str, rng: random.Random) -> str:
    if text[-1:] in ".!?":
        return text.rstrip("?") if rng.random() < 0.25 else text
    return text + rng.choices(["?", "", ".", "!", " ?", "??"], [50, 40, 5, 1, 2, 2])[0]


def _with_courtesy(text: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.05:
        return rng.choice(["please ", "Please, ", "please tell me: "]) + text
    if roll < 0.10:
        return rng.choice(["hi, ", "hey, ", "Hello, ", "ok, ", "so ", "Quick question: ", "and ", "but "]) + text
    if roll < 0.15:
        return text.rstrip("?. ") + rng.choice(
            [" please", ", please", " please?", ", thanks", " thanks", " now", " exactly?"]
        )
    return text


def _with_case(text: str, rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.35:
        return text.lower()
    if roll < 0.37:
        return text.upper()
    return text[:1].upper() + text[1:] if roll < 0.85 else text


def _with_slip(text: str, rng: random.Random) -> str:
    spots = [index for index in range(1, len(text) - 1) if text[index - 1 : index + 2].isalpha()]
    if len(spots) < 4:
        return text
    spot = rng.choice(spots)
    before, letter, after = text[:spot], text[spot], text[spot + 1 :]
    return rng.choice(
        [
            before + after,
            before + letter + letter + after,
            before + after[:1] + letter + after[1:],
            before + rng.choice("aeioustnrlm") + after,
        ]
    )
