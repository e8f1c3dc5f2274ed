"""What stands around a question (system prompts, earlier turns), and the few skills besides rbee."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import wordings
from dialogue import Message, assistant, system, user

_PLAIN_SYSTEM_PROMPT = 0.7
_RULE_COUNTS = (1, 1, 2, 2, 4, 8, 25)
"""Sentences of a made-up system prompt; the longest come to several hundred tokens."""


class SmallTalk:
    """Draws from conversation.yaml."""

    def __init__(self, phrases: Mapping[str, Sequence[str]]) -> None:
        self._phrases = phrases

    def surroundings(self, rng: random.Random, earlier: Sequence[tuple[str, str]]) -> list[Message]:
        """Draw what precedes a question: often nothing, sometimes a system prompt and some of the `earlier` turns."""
        messages: list[Message] = []
        if rng.random() < 0.22:
            messages.append(system(self.system_prompt(rng)))
        if rng.random() < 0.16:
            for question, answer in rng.sample(list(earlier), rng.choice([1, 1, 2])):
                messages += [user(question), assistant(answer)]
        return messages

    def system_prompt(self, rng: random.Random) -> str:
        """Draw a usual system prompt, or one of many made-up rules."""
        if rng.random() < _PLAIN_SYSTEM_PROMPT:
            return self._draw("system_prompts", rng)
        return " ".join(self._draw("rules", rng) for _ in range(rng.choice(_RULE_COUNTS)))

    def skill(self, rng: random.Random) -> list[Message]:
        """Draw a dialogue about the user's name, an echo, a greeting or a count."""
        draw = rng.choices([self._name, self._echo, self._greeting, self._count], [4, 3, 2, 1])[0]
        return draw(rng)

    def _name(self, rng: random.Random) -> list[Message]:
        called = wordings.name(rng)
        given = user(self._draw("name_given", rng, n=called))
        if rng.random() < 0.3:
            return [given, assistant(f"Hello {called}! Ask me something about rbee.")]
        greeted = assistant(self._draw("name_greeted", rng, n=called))
        return [given, greeted, user(self._draw("name_asked", rng)), assistant(f"{called}.")]

    def _echo(self, rng: random.Random) -> list[Message]:
        spoken = self._draw("echoed", rng)
        return [user(self._draw("echo", rng, w=spoken)), assistant(spoken)]

    def _greeting(self, rng: random.Random) -> list[Message]:
        if rng.random() < 0.3:
            return [user(self._draw("hello_in_three", rng)), assistant("Hello from rbee!")]
        return [user(self._draw("hello", rng)), assistant("Hello!")]

    def _count(self, rng: random.Random) -> list[Message]:
        template = rng.choice(self._phrases["count"])
        first = rng.randrange(1, 10) if "{a}" in template and rng.random() < 0.4 else 1
        last = first + rng.randrange(2, 10)
        asked = template.replace("{a}", str(first)).replace("{b}", str(last))
        return [user(asked), assistant(", ".join(str(value) for value in range(first, last + 1)))]

    def _draw(self, group: str, rng: random.Random, **values: str) -> str:
        slots = {slot: (value,) for slot, value in values.items()}
        return wordings.fill(rng.choice(self._phrases[group]), rng, slots)
