"""Files that are no model, or cannot be read: each is named for what it is."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
import zipfile
from pathlib import Path

import pytest

from rbee.errors import InvalidModelFile
from rbee.formats import inspect

SAFETENSORS = struct.pack("<Q", 60) + b'{"weight":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}   '
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4081004224\n"

CONTENTS = {
    "safetensors": (SAFETENSORS, "a safetensors file.*GGUF"),
    "pickle": (pickle.dumps({"weight": 1}), "Python pickle, which can run code"),
    "old PyTorch pickle": (pickle.dumps(["x"], protocol=2), "Python pickle"),
    "web page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page; the download met an error"),
    "web page with spaces before": (b"\n\n  <HTML>\n", "a web page"),
    "error of a server": (b'{"error":"Repository not found"}', "a JSON text"),
    "git-lfs pointer": (LFS, "a git-lfs pointer, not the model itself.*git lfs pull"),
    "gzip": (gzip.compress(b"GGUF"), "gzip-compressed.*gunzip"),
    "zeros": (bytes(4096), "filled with zeros"),
    "text": (b"Call me Ishmael.", "no model file that rbee knows; it begins with 'Call me '"),
    "one byte": (b"G", "no model file that rbee knows"),
    "magic alone": (b"GGUF", "the file ends within the version"),
    "half a header": (b"GGUF" + bytes([3, 0, 0, 0, 1]), "the file ends within the number of tensors"),
    "LoRA adapter": (struct.pack("<II", 0x67676C61, 1), "a LoRA adapter"),
    "empty": (b"", "the file is empty"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_wrong_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = CONTENTS[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModelFile, match=f"(?s){message}") as refused:
        inspect(path)
    assert str(path) in refused.value.message
    assert refused.value.hint


def test_a_pytorch_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(InvalidModelFile, match="a zip archive or a PyTorch checkpoint"):
        inspect(tmp_path / "pytorch_model.bin")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match=r"nowhere\.gguf: there is no such file"):
        inspect(tmp_path / "nowhere.gguf")


def test_a_folder_names_the_models_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(InvalidModelFile, match=r"this is a folder.*a\.gguf"):
        inspect(tmp_path)


@pytest.mark.parametrize("path", ["\0", "a\0b"])
def test_a_path_that_is_none(path: str) -> None:
    with pytest.raises(InvalidModelFile, match="cannot be opened"):
        inspect(Path(path))


def test_a_path_too_long(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match="File name too long"):
        inspect(tmp_path / ("x" * 300))


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidModelFile, match="a device or a pipe"):
        inspect(tmp_path / "pipe.gguf")


def test_devices_and_sockets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match="a device or a pipe"):
        inspect(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(InvalidModelFile, match="cannot be opened"):
            inspect(tmp_path / "socket")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_of_someone_else(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(llama.read_bytes())
    path.chmod(0)
    with pytest.raises(InvalidModelFile, match=r"this user may not read it.*chmod"):
        inspect(path)


def test_no_descriptor_is_left_open(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"text")
    before = len(os.listdir("/proc/self/fd"))
    for path in (llama, tmp_path / "text.gguf", tmp_path):
        try:
            inspect(path)
        except InvalidModelFile:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
