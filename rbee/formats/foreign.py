"""Names what a file is when it is no model that an engine here loads."""

from __future__ import annotations

from dataclasses import dataclass

from rbee.formats.reading import DOWNLOAD_AGAIN

_CONVERT = "a GGUF of the same model, or convert it with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Foreign:
    """What a file turned out to be, and what to try."""

    what: str
    hint: str


_BY_MAGIC: tuple[tuple[bytes, Foreign], ...] = (
    (
        b"FUGG",
        Foreign(
            "a GGUF file with its magic in big-endian order",
            "a little-endian GGUF of the same model",
        ),
    ),
    (b"\x1f\x8b", Foreign("gzip-compressed", "gunzip it first")),
    (b"\x28\xb5\x2f\xfd", Foreign("zstd-compressed", "decompress it first with zstd -d")),
    (b"\xfd7zXZ\x00", Foreign("xz-compressed", "decompress it first with xz -d")),
    (b"BZh", Foreign("bzip2-compressed", "decompress it first with bunzip2")),
    (b"7z\xbc\xaf\x27\x1c", Foreign("a 7-zip archive", "unpack it first")),
    (b"PK\x03\x04", Foreign("a zip archive or a PyTorch checkpoint", _CONVERT)),
    (
        b"\x80\x02",
        Foreign("a Python pickle (an old PyTorch checkpoint), which can run code when loaded", _CONVERT),
    ),
    (b"\x80\x03", Foreign("a Python pickle, which can run code when loaded", _CONVERT)),
    (b"\x80\x04", Foreign("a Python pickle, which can run code when loaded", _CONVERT)),
    (b"\x80\x05", Foreign("a Python pickle, which can run code when loaded", _CONVERT)),
    (b"\x93NUMPY", Foreign("a NumPy array", _CONVERT)),
    (b"\x89HDF\r\n", Foreign("an HDF5 (Keras) file", _CONVERT)),
    (b"\x7fELF", Foreign("a Linux program", "the path of a model file")),
    (b"%PDF", Foreign("a PDF document", "the path of a model file")),
    (
        b"version https://git-lfs",
        Foreign(
            "a git-lfs pointer, not the model itself",
            "git lfs pull in its repository, then try again",
        ),
    ),
)


def recognise(head: bytes, size_bytes: int) -> Foreign | None:
    """Tell from a file's first bytes what it is instead of a model, or None when they say nothing."""
    for magic, foreign in _BY_MAGIC:
        if head.startswith(magic):
            return foreign
    if _is_safetensors(head, size_bytes):
        return Foreign("a safetensors file", _CONVERT)
    return _recognise_text(head)


def _is_safetensors(head: bytes, size_bytes: int) -> bool:
    header_bytes = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and 2 <= header_bytes <= size_bytes - 8


def _recognise_text(head: bytes) -> Foreign | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return Foreign("a web page; the download met an error or a log-in page", DOWNLOAD_AGAIN)
    if text.startswith((b"{", b"[")):
        return Foreign("a JSON text", "the model file beside it, not its configuration or a server's answer")
    if head and not head.strip(b"\0"):
        return Foreign("filled with zeros; the download did not finish", DOWNLOAD_AGAIN)
    if text.startswith(b"#!"):
        return Foreign("a script", "the path of a model file")
    return None
