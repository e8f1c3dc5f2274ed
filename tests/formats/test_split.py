"""A model in several GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats_draft import I32, STRING, U16, U32, Draft, text, u32

from rbee.errors import InvalidModelFile
from rbee.formats import inspect


def split(draft: Draft, folder: Path, *, count: int = 3, promised: int | None = None) -> list[Path]:
    """Write a model as `count` files, as llama-gguf-split does: the tensors in turn, the metadata in the first."""
    paths = [folder / f"tiny-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for index, path in enumerate(paths):
        part = Draft(pairs=list(draft.pairs) if index == 0 else [])
        if index:
            part.put("general.architecture", STRING, text("llama"))
        part.put("split.no", U16, index.to_bytes(2, "little"))
        part.put("split.count", U16, count.to_bytes(2, "little"))
        part.put("split.tensors.count", I32, u32(len(draft.rows) if promised is None else promised))
        for row in draft.rows[index::count]:
            size = 4 * row.shape[0] if len(row.shape) == 1 else 2 * row.shape[0] * row.shape[1]
            at = len(part.data)
            part.data += draft.data[row.offset : row.offset + size]
            part.data += bytes(-len(part.data) % 32)
            part.rows.append(type(row)(row.name, row.shape, row.kind, at))
        path.write_bytes(part.encode())
    return paths


def test_the_first_part_stands_for_all(draft: Draft, llama: Path, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    model, whole = inspect(paths[0]), inspect(llama)
    assert model.parameters == whole.parameters
    assert model.size_bytes == sum(path.stat().st_size for path in paths)
    assert model.capabilities == whole.capabilities


def test_a_later_part_names_the_first(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    with pytest.raises(InvalidModelFile, match=r"part 2 of 3 of a model.*the first part: .*tiny-00001-of-00003\.gguf"):
        inspect(paths[1])


def test_a_later_part_under_the_first_one_s_name(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(InvalidModelFile, match="part 2 of 3"):
        inspect(paths[0])


def test_a_missing_part_is_named(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    paths[2].unlink()
    with pytest.raises(InvalidModelFile, match=r"1 of 3 parts are missing beside it: tiny-00003-of-00003\.gguf"):
        inspect(paths[0])


def test_a_part_cut_short(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-64])
    with pytest.raises(InvalidModelFile, match=r"tiny-00003-of-00003\.gguf: .* past the end of the file"):
        inspect(paths[0])


def test_a_part_that_is_no_gguf(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    paths[1].write_bytes(b"<html>" * 10)
    with pytest.raises(InvalidModelFile, match="part 2 of 3 is no GGUF file"):
        inspect(paths[0])


def test_parts_in_the_wrong_order(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    second, third = paths[1].read_bytes(), paths[2].read_bytes()
    paths[1].write_bytes(third)
    paths[2].write_bytes(second)
    with pytest.raises(InvalidModelFile, match="it is part 3 of 3; part 2 of 3 is needed"):
        inspect(paths[0])


def test_a_name_without_the_number_of_parts(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path)
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(InvalidModelFile, match=r"part 1 of 3, but its name does not say so.*rename"):
        inspect(tmp_path / "model.gguf")


def test_fewer_tensors_than_promised(draft: Draft, tmp_path: Path) -> None:
    paths = split(draft, tmp_path, promised=99)
    with pytest.raises(InvalidModelFile, match="99 tensors are promised, but the 3 parts hold 12"):
        inspect(paths[0])


def test_a_tensor_in_two_parts(draft: Draft, tmp_path: Path) -> None:
    draft.row("output.weight").name = b"token_embd.weight"
    with pytest.raises(InvalidModelFile, match="is in two parts"):
        inspect(split(draft, tmp_path, count=4)[0])


@pytest.mark.parametrize(("key", "kind"), [("split.count", U32), ("split.no", U32)])
def test_a_number_of_parts_that_no_model_has(draft: Draft, tmp_path: Path, key: str, kind: int) -> None:
    draft.put("split.count", U16, b"\2\0")
    draft.put(key, kind, u32(2**31))
    path = tmp_path / "tiny-00001-of-00002.gguf"
    path.write_bytes(draft.encode())
    with pytest.raises(InvalidModelFile, match=f"{key} is {2**31}"):
        inspect(path)
