"""Measures the demo model in llama.cpp's own server: wordings it never saw, other subjects, tools, JSON, repeatability.

python evaluate.py ../../rbee/models/rbee-demo.gguf
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tool_calls
from corpus import Corpus, Topic
from dialogue import user
from judge import DEFAULT_SAMPLING, GREEDY, Judge, Reply, serving

_SEED = 8001
_CALLS = 150
_PER_SKILL = 60
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"name": {"type": "string"}, "ok": {"type": "boolean"}},
    {"city": {"type": "string"}, "population": {"type": "integer"}},
    {"title": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    {"answer": {"type": "string"}, "confidence": {"type": "number"}},
    {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
        }
    },
)

Check = Callable[[], str]
"""Returns what went wrong, or nothing."""


def main() -> None:
    """Print one line a group, and each failure when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--show", action="store_true", help="print each failure")
    chosen = parser.parse_args()
    corpus = Corpus()
    with serving(chosen.model) as judge:
        for sampling, label in ((GREEDY, "temperature 0"), (DEFAULT_SAMPLING, "default sampling")):
            for name, checks in _groups(corpus, judge, sampling):
                _report(f"{name}, {label}", checks, show=chosen.show)
        _report("same answers alone and 8 at once", [lambda: _repeatable(corpus, judge)], show=True)


def _groups(corpus: Corpus, judge: Judge, sampling: dict[str, float]) -> Iterable[tuple[str, list[Check]]]:
    everything = (*corpus.topics, corpus.off_topic)
    yield (
        "learned wordings",
        [_answers(judge, topic, q, sampling) for topic in corpus.topics for q in _drawn(corpus, topic, 3)],
    )
    yield "held-out wordings", [_answers(judge, topic, q, sampling) for topic in corpus.topics for q in topic.held_out]
    yield (
        "other subjects, held out",
        [_answers(judge, corpus.off_topic, q, sampling) for q in corpus.off_topic.held_out],
    )
    yield (
        "other subjects, drawn",
        [_answers(judge, corpus.off_topic, q, sampling) for q in _drawn(corpus, corpus.off_topic, 150)],
    )
    yield "stops with any surroundings", [_stops(judge, corpus, topic, sampling) for topic in everything]
    yield "names, echoes, counts", _skills(corpus, judge, sampling)
    for choice in ("auto", "required"):
        yield f"tool calls, {choice}", _calls(corpus, judge, choice, sampling)
    yield "required call for an unfit question", _unfit_calls(corpus, judge, sampling)
    yield "JSON by schema", _json_answers(corpus, judge, sampling)


def _drawn(corpus: Corpus, topic: Topic, count: int) -> list[str]:
    rng = random.Random(f"{topic.id}{_SEED}")
    return [corpus.ask(topic, rng) for _ in range(count)]


def _answers(judge: Judge, topic: Topic, question: str, sampling: dict[str, float]) -> Check:
    def check() -> str:
        reply = judge.ask(question, **sampling)
        right = all(phrase in reply.content for phrase in topic.expect) and reply.finish_reason == "stop"
        return "" if right else f"{topic.id}: {question!r} -> {reply.content[:90]!r} {reply.finish_reason}"

    return check


def _stops(judge: Judge, corpus: Corpus, topic: Topic, sampling: dict[str, float]) -> Check:
    rng = random.Random(f"stop{topic.id}")
    before = corpus.talk.surroundings(rng, [(corpus.ask(topic, rng), topic.answer)] * 2)
    messages = [*before, user(corpus.ask(topic, rng))]

    def check() -> str:
        reply = judge.chat(messages, **sampling)
        return "" if reply.finish_reason == "stop" and reply.content else f"{messages} -> {reply}"

    return check


def _skills(corpus: Corpus, judge: Judge, sampling: dict[str, float]) -> list[Check]:
    rng = random.Random(_SEED)

    def one(dialogue: list[dict[str, Any]]) -> Check:
        def check() -> str:
            reply = judge.chat(dialogue[:-1], **sampling)
            return "" if reply.content == dialogue[-1]["content"] else f"{dialogue[:-1]} -> {reply.content!r}"

        return check

    return [one(corpus.talk.skill(rng)) for _ in range(_PER_SKILL)]


def _calls(corpus: Corpus, judge: Judge, choice: str, sampling: dict[str, float]) -> list[Check]:
    rng = random.Random(_SEED)

    def one(call: tool_calls.Call, others: Sequence[dict[str, Any]]) -> Check:
        def check() -> str:
            tools = [call.tool, *(tool for tool in others if tool["function"]["name"] != call.name)]
            reply = judge.ask(call.question, tools=tools, tool_choice=choice, **sampling)
            fault = _call_fault(reply)
            if not fault and (reply.calls[0]["name"], json.loads(reply.calls[0]["arguments"])) != (
                call.name,
                call.arguments,
            ):
                fault = f"{reply.calls[0]}"
            return fault and f"{call.question!r} for {call.name}{call.arguments} -> {fault}"

        return check

    return [one(corpus.tools.draw(rng), [corpus.tools.draw(rng).tool]) for _ in range(_CALLS)]


def _unfit_calls(corpus: Corpus, judge: Judge, sampling: dict[str, float]) -> list[Check]:
    rng = random.Random(_SEED)

    def one(question: str, tool: dict[str, Any]) -> Check:
        def check() -> str:
            reply = judge.ask(question, tools=[tool], tool_choice="required", **sampling)
            fault = _call_fault(reply)
            return fault and f"{question!r} {tool['function']['name']} -> {fault}"

        return check

    topics = (*corpus.topics, corpus.off_topic)
    return [one(corpus.ask(rng.choice(topics), rng), corpus.tools.draw(rng).tool) for _ in range(_PER_SKILL)]


def _call_fault(reply: Reply) -> str:
    if reply.finish_reason != "tool_calls" or not reply.calls:
        return f"{reply.finish_reason} {reply.content[:90]!r}"
    return (
        ""
        if isinstance(json.loads(reply.calls[0]["arguments"]), dict)
        else f"arguments {reply.calls[0]['arguments']!r}"
    )


def _json_answers(corpus: Corpus, judge: Judge, sampling: dict[str, float]) -> list[Check]:
    rng = random.Random(_SEED)

    def one(question: str, properties: dict[str, Any]) -> Check:
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}

        def check() -> str:
            reply = judge.ask(question, response_format=wanted, **sampling)
            right = reply.finish_reason == "stop" and set(json.loads(reply.content)) == set(properties)
            return "" if right else f"{question!r} {list(properties)} -> {reply.finish_reason} {reply.content[:120]!r}"

        return check

    topics = (*corpus.topics, corpus.off_topic)
    questions = ["Give me an example.", "Return JSON.", *(corpus.ask(rng.choice(topics), rng) for _ in range(10))]
    return [one(question, properties) for question in questions for properties in _SCHEMAS]


def _repeatable(corpus: Corpus, judge: Judge) -> str:
    questions = [topic.held_out[0] for topic in corpus.topics][:40]

    def answer(question: str) -> str:
        return judge.ask(question, **GREEDY).content

    alone = [answer(question) for question in questions]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(answer, questions))
    changed = [question for question, one, other in zip(questions, alone, together, strict=True) if one != other]
    return f"differs: {changed}" if changed else ""


def _report(name: str, checks: list[Check], *, show: bool) -> None:
    with ThreadPoolExecutor(8) as threads:
        faults = [fault for fault in threads.map(lambda check: check(), checks) if fault]
    print(f"{len(checks) - len(faults)}/{len(checks)}  {name}", flush=True)
    for fault in faults if show else ():
        print("    " + fault)


if __name__ == "__main__":
    main()
