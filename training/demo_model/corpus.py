"""Reads the text files and mixes them into training examples."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import tool_calls
import wordings
from conversation import SmallTalk
from dialogue import Message, assistant, tool_call, user
from examples import Example

_GLIMPSES = 0.7
"""Share of plain questions whose answer is shown only in its opening."""
_PLAINEST = 0.15
"""Share of questions in a topic's first wording, the one that most people will use."""
TEXT_FOLDER = Path(__file__).with_name("text")


@dataclass(frozen=True)
class Topic:
    """One answer and the wordings that ask for it."""

    id: str
    answer: str
    expect: tuple[str, ...]
    ask: tuple[str, ...]
    held_out: tuple[str, ...]


class Corpus:
    """All text of the demo model."""

    def __init__(self, folder: Path = TEXT_FOLDER) -> None:
        off_topic = _read(folder / "off_topic.yaml")
        self.macros: dict[str, str] = _read(folder / "macros.yaml")
        self.slots: dict[str, list[str]] = off_topic["slots"]
        self.topics = tuple(_topic(entry) for entry in _read(folder / "topics.yaml"))
        self.off_topic = _topic({"id": "off-topic", **off_topic})
        self._held_out = {_bare(q) for topic in (*self.topics, self.off_topic) for q in topic.held_out}
        self.talk = SmallTalk(_read(folder / "conversation.yaml"))
        self.tools = tool_calls.ToolBook(_read(folder / "tools.yaml"), self.slots)

    def example(self, rng: random.Random) -> Example:
        """Draw one training example of the mix."""
        kinds: list[tuple[int, Callable[[random.Random], Example]]] = [
            (52, self._about_rbee),
            (14, self._about_else),
            (5, self._small_skill),
            (13, lambda rng: tool_calls.called(self.tools, self._before(rng), rng)),
            (4, lambda rng: tool_calls.answered(self.tools, self._before(rng), rng)),
            (4, lambda rng: tool_calls.declined(self.tools, self._before(rng), *self._turn(rng), rng)),
            (3, lambda rng: tool_calls.imposed_call(self.tools, self._before(rng), *self._turn(rng), rng)),
            (3, lambda rng: tool_calls.imposed_json(self.tools, self._before(rng), self._turn(rng)[0], rng)),
            (2, self._plain_text),
        ]
        return rng.choices([draw for _, draw in kinds], [share for share, _ in kinds])[0](rng)

    def ask(self, topic: Topic, rng: random.Random) -> str:
        """Draw a wording of a question, as a person might type it; never one that is held out."""
        while True:
            question = self._draw(topic, rng)
            if _bare(question) not in self._held_out:
                return wordings.as_typed(question, rng, about_rbee=topic is not self.off_topic)

    def _draw(self, topic: Topic, rng: random.Random) -> str:
        ask = topic.ask[0] if rng.random() < _PLAINEST else rng.choice(topic.ask)
        question = wordings.expand(ask, rng, self.macros)
        return wordings.fill(question, rng, self.slots) if topic is self.off_topic else question

    def _about_rbee(self, rng: random.Random) -> Example:
        topic = rng.choice(self.topics)
        return self._answered(topic, rng)

    def _about_else(self, rng: random.Random) -> Example:
        return self._answered(self.off_topic, rng)

    def _answered(self, topic: Topic, rng: random.Random) -> Example:
        whole = Example.of_dialogue([*self._before(rng), user(self.ask(topic, rng)), assistant(topic.answer)])
        return replace(whole, glimpse=rng.random() < _GLIMPSES)

    def _small_skill(self, rng: random.Random) -> Example:
        before = self._before(rng) if rng.random() < 0.5 else []
        return Example.of_dialogue([*before, *self.talk.skill(rng)])

    def _plain_text(self, rng: random.Random) -> Example:
        topic = rng.choice((*self.topics, self.off_topic))
        if rng.random() < 0.2:
            return Example.of_text("", topic.answer)
        return Example.of_text(self.ask(topic, rng) + rng.choice(["\n", "\n\n", "\nAnswer: "]), topic.answer)

    def _turn(self, rng: random.Random) -> tuple[str, str]:
        topic = self.off_topic if rng.random() < 0.4 else rng.choice(self.topics)
        return self.ask(topic, rng), topic.answer

    def _before(self, rng: random.Random) -> list[Message]:
        return self.talk.surroundings(rng, [self._turn(rng) for _ in range(2)])


def vocabulary_texts(corpus: Corpus, rng: random.Random) -> list[str]:
    """Draw what the tokenizer is learned from: real words only, since invented ones would fill it with syllables."""
    without_inventions = {"word": ["x"], "Word": ["X"], "number": ["1"], "name": ["Alice"], **corpus.slots}
    texts: list[str] = []
    for topic in (*corpus.topics, corpus.off_topic):
        texts += [topic.answer] * 60
        for ask in topic.ask:
            drawn = (wordings.expand(ask, rng, corpus.macros) for _ in range(12))
            questions = [wordings.fill(question, rng, without_inventions) for question in drawn]
            texts += [question[:1].upper() + question[1:] for question in questions[::2]]
            texts += [question.lower() for question in questions[1::2]]
    for values in corpus.slots.values():
        texts += [value for value in values if "{" not in value] * 12
    calls = [corpus.tools.draw(rng) for _ in range(2000)]
    texts += [
        Example.of_dialogue([user(""), tool_call(call.name, {})], [call.tool]).prompt
        for call in calls
        if "_" in call.name
    ]
    return texts + ['{"name": "", "arguments": {"": ""}}'] * 2000


def _bare(question: str) -> str:
    return question.lower().strip("?!. ")


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def _topic(entry: dict[str, Any]) -> Topic:
    return Topic(
        id=entry["id"],
        answer=entry["answer"],
        expect=tuple(entry["expect"]),
        ask=tuple(entry["ask"]),
        held_out=tuple(entry["held_out"]),
    )
