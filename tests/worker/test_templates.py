"""Chat templates are strangers' programs: honest ones work, hostile ones end in an error and touch nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.errors import InvalidRequest, NotSupported
from rbee.wire.openai import Message
from rbee.worker.render import Renderer

HELLO = [Message(role="user", content="hello")]
DOUBLE = "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
SHARED = "{% set ns = namespace(l=['a']) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
TWIN = SHARED + "{% set o = namespace(l=['ab'[:1]]) %}{% for i in range(60) %}{% set o.l = [o.l, o.l] %}{% endfor %}"

HOSTILE = {
    "a process by lipsum": '{{ lipsum.__globals__["os"].popen("touch CANARY").read() }}',
    "a process by cycler": '{{ cycler.__init__.__globals__.os.popen("touch CANARY").read() }}',
    "a process by attr": "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__') }}{{ ()|attr('x')() }}",
    "a process by subclasses": "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}",
    "a process by format": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format('')() }}",
    "a process by map": "{{ [''] | map(attribute='__class__.__mro__') | list | first | first }}{{ none.x.y }}",
    "a process by strftime": "{{ strftime_now.__globals__['os'].system('touch CANARY') }}",
    "a process by messages": "{{ messages.__class__.__base__.__subclasses__().x.y }}",
    "a file by include": "{% include 'CANARY' %}",
    "a file by import": "{% import 'CANARY' as x %}",
    "a large range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a filter over ranges": "{% for i in range(99999) %}{{ range(99999)|map('string')|join|length }}{% endfor %}",
    "a large text": "{{ 'x' * 10**10 }}",
    "a large constant": "{{ 'x'|center(10000000000) }}",
    "a large number": "{{ 9**(9**9) }}",
    "a large format": "{{ '%1000000000000d' % 1 }}",
    "doubling": DOUBLE + "{{ ns.s }}",
    "a shared list printed": SHARED + "{{ ns.l }}",
    "shared lists compared": TWIN + "{{ ns.l == o.l }}",
    "one gigabyte of output": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "no syntax": "{% if %}",
    "a change of the messages": "{{ messages.append(1) }}",
}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "CANARY"


@pytest.fixture
def rendered() -> Iterator[type[Renderer]]:
    made: list[Renderer] = []

    class Closed(Renderer):
        def __init__(self, template: str | None, tokens: dict[str, str] | None = None) -> None:
            super().__init__(template, tokens or {})
            made.append(self)

    yield Closed
    for renderer in made:
        renderer.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error(name: str, canary: Path, rendered: type[Renderer]) -> None:
    renderer = rendered(HOSTILE[name], {})
    with pytest.raises(InvalidRequest, match="chat template failed"):
        renderer.chat(HELLO)
    assert not canary.exists()


def test_a_template_that_was_stopped_can_be_tried_again(rendered: type[Renderer]) -> None:
    slow = "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    renderer = rendered(slow + "{% else %}fine{% endif %}", {})
    with pytest.raises(InvalidRequest):
        renderer.chat(HELLO * 2)
    assert renderer.chat(HELLO) == "fine"


def test_the_process_can_open_no_file_and_start_nothing(canary: Path) -> None:
    """What a hole in Jinja's sandbox would reach: the same code that a template runs in, without the sandbox."""
    attempts = (
        "open('CANARY', 'w')",
        "open('/etc/hostname')",
        "os.system('touch CANARY')",
        "os.fork()",
        "socket.socket()",
    )
    for attempt in attempts:
        code = f"import os, socket, rbee.worker.render_process as p; p._confine(1 << 30); {attempt}"
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert "PermissionError: a chat template may not" in ended.stderr, attempt
        assert not canary.exists()


def test_an_honest_template_has_what_models_expect(rendered: type[Renderer]) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  <|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ {'ä': [1]} | tojson }}"
    )
    turns = [Message(role="developer", content=" be kind "), Message(role="user", content="hi"), *HELLO]
    text = rendered(template, {"bos_token": "<s>", "eos_token": "</s>"}).chat(turns)
    assert text == '<s>  <|system|>be kind</s>\n  <|user|>hi</s>\n<|assistant|>{"ä": [1]}'


def test_a_template_may_refuse_in_its_own_words(rendered: type[Renderer]) -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}", {}).chat(HELLO)


def test_a_model_without_a_template_gets_a_transcript(rendered: type[Renderer]) -> None:
    assert rendered(None, {}).chat(HELLO) == "User: hello\nAssistant:"


def test_parts_that_are_no_text_are_refused(rendered: type[Renderer]) -> None:
    with pytest.raises(NotSupported, match="input_audio"):
        rendered(None, {}).chat([Message(role="user", content=[{"type": "input_audio"}])])
