"""Dialogues in which tools are offered, called and answered, and answers that a JSON grammar imposes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import wordings
from dialogue import CALL_OPEN, Message, assistant, dump_json, tool_call, tool_result, user
from examples import Example

_NEVER_SEEN = 0.33
"""Share of tools with an invented name; in tools.yaml they are the last two entries."""


@dataclass(frozen=True)
class Call:
    """A question, the tool that answers it, and the arguments to copy."""

    tool: Message
    question: str
    name: str
    arguments: dict[str, Any]


class ToolBook:
    """Draws calls from the descriptions in tools.yaml."""

    def __init__(self, text: Mapping[str, Any], slots: Mapping[str, Sequence[str]]) -> None:
        self._text = text
        self._slots = {**slots, **text["slots"]}

    def draw(self, rng: random.Random) -> Call:
        """Draw a tool with a question that fits it."""
        tools = self._text["tools"]
        entry = rng.choice(tools[-2:] if rng.random() < _NEVER_SEEN else tools)
        verb = rng.choice(self._slots["verb"])
        name = self._fill(rng.choice(entry["names"]), rng, verb=verb)
        question = rng.choice(entry["ask"])
        shown: dict[str, str] = {"tool": name, "verb": verb}
        arguments, properties = {}, {}
        for slot, argument in entry["slots"].items():
            key = self._fill(rng.choice(argument["names"]), rng)
            shown[slot], arguments[key] = self._value(argument["kind"], rng)
            properties[key] = {"type": argument["type"]}
        description = self._fill(rng.choice(entry["description"]), rng, verb=verb)
        return Call(
            _tool(name, description, properties, rng), _ended(self._fill(question, rng, **shown), rng), name, arguments
        )

    def offer(self, tool: Message, rng: random.Random) -> list[Message]:
        """Put `tool` among up to nine others."""
        others = [self.draw(rng).tool for _ in range(rng.choices([0, 1, 2, 4, 9], [52, 26, 13, 6, 3])[0])]
        return _without_twins([tool, *others], rng)

    def said(self, rng: random.Random) -> str:
        """Draw a tool's result."""
        return self._fill(rng.choice(self._text["said"]), rng)

    def json_value(self, question: str, rng: random.Random, depth: int = 2) -> Any:
        """Draw a small JSON value whose strings often come from the question; nested up to `depth`."""
        if depth and rng.random() < (0.8 if depth == 2 else 0.15):
            keys = [self._fill(rng.choice(self._text["json"]["keys"]), rng) for _ in range(rng.choice([1, 2, 2, 3, 4]))]
            return {key: self.json_value(question, rng, depth - 1) for key in keys}
        if depth and (depth == 2 or rng.random() < 0.15):
            return [self.json_value(question, rng, 0) for _ in range(rng.choice([0, 1, 2, 3]))]
        if rng.random() < 0.55:
            return self.words_of(question, rng)
        return rng.choice([True, False, int(wordings.number(rng)), int(wordings.number(rng)) / 10, None])

    def words_of(self, question: str, rng: random.Random) -> str:
        """Take one to three neighbouring words of a question, or some usual word."""
        words = [word for word in (raw.strip("?.,!:;\"'`[]{}()") for raw in question.split()) if word.isalnum()]
        if not words or rng.random() < 0.3:
            return self._fill(rng.choice(self._text["json"]["words"]), rng)
        start = rng.randrange(len(words))
        return " ".join(words[start : start + rng.choice([1, 1, 2, 3])])

    def _value(self, kind: str, rng: random.Random) -> tuple[str, Any]:
        if kind == "boolean":
            return rng.choice([("on", True), ("off", False)])
        text = self._fill(rng.choice(self._text["kinds"][kind]), rng, CODE=wordings.invented_word(rng)[:3].upper())
        return text, int(text) if kind == "number" else text

    def _fill(self, template: str, rng: random.Random, **values: str) -> str:
        return wordings.fill(template, rng, {**self._slots, **{slot: (value,) for slot, value in values.items()}})


def called(book: ToolBook, before: Sequence[Message], rng: random.Random) -> Example:
    """Call the tool that fits the question."""
    call = book.draw(rng)
    messages = [*before, user(call.question), tool_call(call.name, call.arguments)]
    return Example.of_dialogue(messages, book.offer(call.tool, rng))


def answered(book: ToolBook, before: Sequence[Message], rng: random.Random) -> Example:
    """Repeat what the tool said."""
    call, said = book.draw(rng), book.said(rng)
    answer = assistant(f"The tool says: {said}")
    messages = [*before, user(call.question), tool_call(call.name, call.arguments), tool_result(said), answer]
    if rng.random() < 0.8:
        return Example.of_dialogue(messages, book.offer(call.tool, rng))
    again = book.draw(rng)
    messages += [user(again.question), tool_call(again.name, again.arguments)]
    return Example.of_dialogue(messages, _without_twins([again.tool, call.tool], rng))


def declined(book: ToolBook, before: Sequence[Message], question: str, answer: str, rng: random.Random) -> Example:
    """Answer in words although tools are offered."""
    return Example.of_dialogue([*before, user(question), assistant(answer)], book.offer(book.draw(rng).tool, rng))


def imposed_call(book: ToolBook, before: Sequence[Message], question: str, answer: str, rng: random.Random) -> Example:
    """Call some tool for a question that fits none, because the server insists (`tool_choice: required`)."""
    call = book.draw(rng)
    arguments = {
        key: book.words_of(question, rng) if isinstance(value, str) else value for key, value in call.arguments.items()
    }
    message = tool_call(call.name, arguments)
    if rng.random() < 0.5:
        message["content"] = answer
    return Example.of_dialogue([*before, user(question), message], book.offer(call.tool, rng), CALL_OPEN)


def imposed_json(book: ToolBook, before: Sequence[Message], question: str, rng: random.Random) -> Example:
    """Write a short JSON value for a question, because a grammar insists (`response_format`)."""
    text = dump_json(book.json_value(question, rng))
    return Example.of_dialogue([*before, user(question), assistant(text)], (), text[0])


def _tool(name: str, description: str, properties: dict[str, Any], rng: random.Random) -> Message:
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": list(properties)}
    if rng.random() < 0.1:
        properties[rng.choice(["unit", "verbose", "limit", "format"])] = {"type": "string"}
    function: dict[str, Any] = {"name": name, "parameters": parameters}
    if description and rng.random() < 0.9:
        function["description"] = description
    return {"type": "function", "function": function}


def _without_twins(tools: Sequence[Message], rng: random.Random) -> list[Message]:
    by_name = {tool["function"]["name"]: tool for tool in reversed(tools)}
    return rng.sample(list(by_name.values()), len(by_name))


def _ended(question: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        question = question[:1].lower() + question[1:]
    return question + rng.choices(["?", "", ".", "!", ", please"], [50, 35, 10, 1, 4])[0]
