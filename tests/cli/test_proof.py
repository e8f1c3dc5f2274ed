"""Proof bundles: written whole, read back, run again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_rig import Person

from rbee.testing.models import write_gpt2_ggml

QUESTION = ("-p", "How do I add a machine?")


def bundle(person: Person, run_id: str = "test-001") -> Path:
    return person.folder / ".proof_bundle" / "integration" / run_id


def test_a_run_leaves_a_bundle_that_can_be_verified(person: Person) -> None:
    done = person.rbee("infer", *QUESTION, "--max-tokens", "40", LLORCH_RUN_ID="test-001")
    assert done.returncode == 0, done.stderr
    folder = bundle(person)
    assert sorted(os.listdir(folder)) == ["metadata.json", "result.txt", "seeds.json", "transcript.ndjson"]
    assert json.loads((folder / "seeds.json").read_text()) == {"seed": 42, "temperature": 0.0}
    # A terminal's line is ended when the answer does not do it itself.
    assert (folder / "result.txt").read_text().removesuffix("\n") == done.stdout.removesuffix("\n")

    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["run_id"] == "test-001"
    assert metadata["prompt"] == QUESTION[1]
    assert metadata["model"]["name"] == "rbee-demo"
    assert len(metadata["model"]["sha256"]) == 64
    assert metadata["engine"]["name"] == "xllamacpp"
    assert metadata["engine"]["version"]
    assert metadata["engine"]["device"] == "cpu"
    assert metadata["job"].startswith("job_")

    events = [json.loads(line) for line in (folder / "transcript.ndjson").read_text().splitlines()]
    assert events[-1]["data"] == "[DONE]"
    times = [event["at_s"] for event in events]
    assert times == sorted(times)
    texts = [
        choice["delta"].get("content") or "" for event in events[:-1] for choice in event["data"].get("choices", [])
    ]
    assert "".join(texts) == (folder / "result.txt").read_text()

    same = person.rbee("proof", "verify", str(folder))
    assert (same.returncode, same.stdout[:5]) == (0, "same:"), same.stdout + same.stderr
    alone = person.rbee("proof", "verify", "--ephemeral", str(folder))
    assert alone.returncode == 0, alone.stdout + alone.stderr


def test_two_runs_give_the_same_result(person: Person) -> None:
    for run_id in ("one", "two"):
        person.rbee("infer", *QUESTION, LLORCH_RUN_ID=run_id)
    assert (bundle(person, "one") / "result.txt").read_bytes() == (bundle(person, "two") / "result.txt").read_bytes()


def test_what_was_given_is_recorded(person: Person) -> None:
    person.rbee(
        "infer", "-m", "echo", "-p", "a b", "--seed", "7", "--temperature", "0.5", "--system", "S", LLORCH_RUN_ID="x"
    )
    assert json.loads((bundle(person, "x") / "seeds.json").read_text()) == {"seed": 7, "temperature": 0.5}
    assert json.loads((bundle(person, "x") / "metadata.json").read_text())["system"] == "S"


def test_a_different_answer_is_shown(person: Person) -> None:
    person.rbee("infer", "-m", "echo", "-p", "one two three four", LLORCH_RUN_ID="x")
    (bundle(person, "x") / "result.txt").write_text("one two 3 four")
    done = person.rbee("proof", "verify", str(bundle(person, "x")))
    assert done.returncode == 1
    assert "character 9" in done.stdout
    assert "3 four" in done.stdout
    assert "three four" in done.stdout


def test_a_second_run_replaces_the_first_as_a_whole(person: Person) -> None:
    person.rbee("infer", "-m", "echo", "-p", "first", LLORCH_RUN_ID="x")
    (bundle(person, "x") / "stray").write_text("")
    person.rbee("infer", "-m", "echo", "-p", "second", LLORCH_RUN_ID="x")
    assert (bundle(person, "x") / "result.txt").read_text() == "second"
    assert not (bundle(person, "x") / "stray").exists()
    assert os.listdir(bundle(person, "x").parent) == ["x"]


def test_a_run_that_fails_leaves_no_bundle(person: Person) -> None:
    assert person.rbee("infer", "-m", "nothing", "-p", "x", LLORCH_RUN_ID="x").returncode == 4
    assert not (person.folder / ".proof_bundle").exists()


@pytest.mark.parametrize("run_id", ["../x", "a/b", "/etc", ".", "..", ".hidden", "a..b", "x" * 101, "a b", "-x", "a\n"])
def test_a_run_id_that_is_a_path_trick_is_refused(person: Person, run_id: str) -> None:
    done = person.rbee("infer", "-p", "x", LLORCH_RUN_ID=run_id)
    assert done.returncode == 2
    assert "LLORCH_RUN_ID" in done.stderr
    assert os.listdir(person.folder) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "wrong", "binary"])
def test_a_folder_that_is_no_bundle_ends_with_2(person: Person, damage: str) -> None:
    folder = person.folder / "bundle"
    folder.mkdir()
    metadata = {"run_id": "x", "rbee": "0", "job": "", "model": {"name": "echo"}, "engine": {}, "prompt": "x"}
    if damage != "missing":
        (folder / "seeds.json").write_text("" if damage == "empty" else '{"seed": 1, "temperature": 0}')
        (folder / "metadata.json").write_text(json.dumps(metadata | ({"prompt": 5} if damage == "wrong" else {})))
        (folder / "result.txt").write_bytes(b"\xff\xfe" if damage == "binary" else b"x")
    done = person.rbee("proof", "verify", str(folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rbee: ")
    assert not person.processes()


@pytest.mark.parametrize("engine", ["xllamacpp", "llama-cpp-python", "ctransformers"])
def test_every_engine_gives_the_same_result_again(person: Person, engine: str) -> None:
    model, options = "rbee-demo", []
    if engine == "ctransformers":
        write_gpt2_ggml(person.folder / "tiny.bin")
        model, options = "tiny", ["--option", "model_type=gpt2"]
        added = person.rbee("model", "add", str(person.folder / "tiny.bin"))
        assert added.returncode == 0, added.stderr
    spawned = person.rbee("worker", "spawn", "-m", model, "--backend", engine, *options)
    assert spawned.returncode == 0, spawned.stderr
    results = []
    for run_id in ("one", "two"):
        done = person.rbee("infer", "-m", model, *QUESTION, "--max-tokens", "30", LLORCH_RUN_ID=run_id)
        assert done.returncode == 0, done.stderr
        results.append((bundle(person, run_id) / "result.txt").read_bytes())
        assert json.loads((bundle(person, run_id) / "metadata.json").read_text())["engine"]["name"] == engine
    assert results[0] == results[1]
    assert results[0]
    same = person.rbee("proof", "verify", str(bundle(person, "one")))
    assert same.returncode == 0, same.stdout + same.stderr
