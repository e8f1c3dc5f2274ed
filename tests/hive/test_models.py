"""The models that a hive lists, over its HTTP."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hive_rig import FakeQueen, RunningHive, StartHive, install, until

from rbee.errors import RbeeError
from rbee.hive.catalog import safe_name
from rbee.paths import BUILT_IN_FILE
from rbee.wire.fleet import AddModel, ModelReport


def add(hive: RunningHive, path: Path | str, name: str = "") -> ModelReport:
    return hive.client.post("/v1/models", AddModel(path=str(path), name=name), ModelReport)


def remove(hive: RunningHive, name: str) -> ModelReport:
    return hive.client.delete(f"/v1/models/{name}", ModelReport)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(BUILT_IN_FILE, tmp_path / "My Model (v2).Q8_0.gguf"))


def test_the_model_in_the_box_is_listed_and_stays(hive: RunningHive) -> None:
    model = hive.models()["rbee-demo"]
    assert (model.builtin, model.format, model.problem) == (True, "gguf", "")
    assert "chat" in model.capabilities
    assert model.size_bytes == BUILT_IN_FILE.stat().st_size
    with pytest.raises(RbeeError, match=r"'rbee-demo' is part of rbee and cannot be removed"):
        remove(hive, "rbee-demo")


def test_a_file_is_listed_found_again_after_a_restart_and_removed(start_hive: StartHive, file: Path) -> None:
    hive = start_hive()
    model = add(hive, file)
    assert model.name == "My-Model-v2-.Q8_0"
    assert (model.path, model.format, model.builtin) == (str(file), "gguf", False)
    assert model.context_tokens > 0
    hive.terminate()
    hive = start_hive("--ephemeral")
    assert hive.models()[model.name] == model
    assert remove(hive, model.name).name == model.name
    assert model.name not in hive.models()
    assert file.exists(), "only the listing goes"


def test_the_same_file_again_changes_nothing_and_a_name_is_for_one_file(hive: RunningHive, file: Path) -> None:
    first = add(hive, file, "mine")
    assert add(hive, file).name == first.name
    assert add(hive, file, "mine").name == first.name
    assert sum(model.path == str(file) for model in hive.models().values()) == 1
    other = Path(shutil.copy(file, file.with_name("other.gguf")))
    with pytest.raises(RbeeError, match="'mine' is taken by") as caught:
        add(hive, other, "mine")
    assert (caught.value.status, caught.value.param) == (400, "name")
    link = file.with_name("link.gguf")
    link.symlink_to(file)
    assert add(hive, link).name == "mine", "a link is the file it points to"


def test_a_file_that_is_moved_away_is_a_problem_until_it_is_back(hive: RunningHive, file: Path) -> None:
    name = add(hive, file).name
    away = file.rename(file.with_suffix(".away"))
    assert "No such file" in hive.models()[name].problem
    with pytest.raises(RbeeError, match="No such file"):
        hive.spawn(name, "trial-files")
    away.rename(file)
    assert hive.models()[name].problem == ""
    assert hive.ready(name, "trial-files").model == name


def test_a_file_that_changed_is_a_problem_until_it_is_listed_again(hive: RunningHive, file: Path) -> None:
    name = add(hive, file).name
    with open(file, "ab") as longer:
        longer.write(b"\0" * 32)
    assert "has" in hive.models()[name].problem
    assert add(hive, file).problem == ""
    assert hive.models()[name].problem == ""


def test_files_that_are_no_models(hive: RunningHive, file: Path, tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in ("half.gguf", "text.gguf", "empty.gguf", "pipe.gguf", "missing.gguf", ""):
        with pytest.raises(RbeeError) as caught:
            add(hive, tmp_path / path)
        assert (caught.value.status, caught.value.code) == (400, "invalid_model_file")
        assert str(tmp_path) in str(caught.value)
    for given in ("relative.gguf", "~nobody-here/x.gguf", "/\0"):
        with pytest.raises(RbeeError) as caught:
            add(hive, given)
        assert (caught.value.status, caught.value.param) == (400, "path")
    assert set(hive.models()) == {"rbee-demo", "echo", "trial"}


@pytest.mark.parametrize("name", ["-x", "a/b", "../x", "a b", "x" * 97, "rbee-demo", "trial"])
def test_names_that_cannot_be_given(hive: RunningHive, file: Path, name: str) -> None:
    with pytest.raises(RbeeError) as caught:
        add(hive, file, name)
    assert (caught.value.status, caught.value.param) == (400, "name")


def test_what_is_not_there_cannot_be_removed(hive: RunningHive) -> None:
    with pytest.raises(RbeeError, match="no model named 'nothing'") as caught:
        remove(hive, "nothing")
    assert caught.value.status == 404


def test_an_unknown_model_names_near_ones(hive: RunningHive) -> None:
    with pytest.raises(RbeeError, match=r"Did you mean 'rbee-demo'.*Installed: .*trial") as caught:
        hive.spawn("rbee-dmo", "trial-files")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_an_engine_that_does_other_work_or_lacks_something_is_refused(hive: RunningHive) -> None:
    with pytest.raises(RbeeError, match=r"made for .*trial-pictures does image") as caught:
        hive.spawn("rbee-demo", "trial-pictures")
    assert caught.value.code == "not_supported"
    with pytest.raises(RbeeError, match=r"it lacks libtrial\.so\.1"):
        hive.spawn("rbee-demo", "trial-lame")
    assert "trial-lame" not in hive.models(), "an engine that cannot run is no model"


def test_an_engine_without_files_is_a_model_of_its_name(hive: RunningHive, plugins: Path) -> None:
    model = hive.models()["trial"]
    assert (model.builtin, model.format, model.capabilities) == (True, "", ["chat"])
    with pytest.raises(RbeeError, match="part of rbee"):
        remove(hive, "trial")


def test_an_engine_that_is_installed_while_the_hive_runs_is_found(hive: RunningHive, plugins: Path) -> None:
    hive.ready("trial")
    with pytest.raises(RbeeError, match=r"No engine named 'trial-new' is installed\. Installed: .*trial"):
        hive.spawn("rbee-demo", "trial-new")
    install(plugins, {"trial": "Trial", "trial-new": "Files"}, version="1.1")
    assert hive.spawn("rbee-demo", "trial-new").backend == "trial-new"


def test_a_catalog_that_was_damaged_is_told_and_restored(start_hive: StartHive, file: Path) -> None:
    hive = start_hive()
    add(hive, file, "first")
    add(hive, Path(shutil.copy(file, file.with_name("other.gguf"))), "second")
    hive.kill()
    catalog = hive.home / "state/catalog.json"
    catalog.write_bytes(catalog.read_bytes()[:-20])
    hive = start_hive("--ephemeral")
    assert "first" in hive.models()
    assert f"{catalog} was damaged" in hive.log()
    assert "catalog.json.bak" in hive.log()


def test_names_made_of_files() -> None:
    names = {
        "model.gguf": "model",
        "Llama-3-8B-Q4_K_M-00001-of-00004.gguf": "Llama-3-8B-Q4_K_M",
        "../..gguf": "model",
        "日本.gguf": "model",
        "-rf.gguf": "rf",
        "x" * 200 + ".gguf": "x" * 96,
    }
    assert {file: safe_name(Path("/models") / file) for file in names} == names


def test_models_are_reported_when_they_change(start_hive: StartHive, queen: FakeQueen, file: Path) -> None:
    hive = start_hive("--ephemeral", "--queen", queen.url)
    add(hive, file, "mine")
    until(lambda: queen.reports and "mine" in {m.name for m in queen.reports[-1].models}, "the new model in a report")
