"""What a shared library asks of the machine that loads it: other libraries, and a version of glibc."""

from __future__ import annotations

import re
import struct

from msgspec import Struct

PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_STRTAB, DT_VERNEED, DT_VERNEEDNUM = 1, 5, 0x6FFFFFFE, 0x6FFFFFFF
MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64"}
GLIBC = re.compile(r"GLIBC_(\d+)\.(\d+)")


class Needs(Struct, frozen=True):
    """The libraries that a file names, the newest (major, minor) of glibc whose symbols it uses, and its machine."""

    machine: str = ""
    libraries: tuple[str, ...] = ()
    glibc: tuple[int, int] = (0, 0)


def needs(data: bytes) -> Needs:
    """Read the dynamic section of an ELF file of 64 bits, little endian; any other file needs nothing.

    Source: the System V ABI, "Program Loading and Dynamic Linking", and the LSB for symbol versions.
    """
    if not data.startswith(b"\x7fELF\x02\x01"):
        return Needs()
    try:
        return _Image(data).needs()
    except (struct.error, ValueError, OverflowError):
        return Needs()


class _Image:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._machine = MACHINES.get(struct.unpack_from("<H", data, 18)[0], "")
        (offset,) = struct.unpack_from("<Q", data, 32)
        size, count = struct.unpack_from("<HH", data, 54)
        # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz
        self._segments = [struct.unpack_from("<IIQQQQ", data, offset + index * size) for index in range(count)]

    def needs(self) -> Needs:
        dynamic = self._dynamic()
        strings = dict(dynamic)
        if DT_STRTAB not in strings:
            return Needs(self._machine)
        table = self._file_offset(strings[DT_STRTAB])
        libraries = tuple(self._text(table + value) for tag, value in dynamic if tag == DT_NEEDED)
        versions: list[tuple[int, int]] = [(0, 0)]
        if DT_VERNEED in strings:
            start = self._file_offset(strings[DT_VERNEED])
            for name in self._versions(start, strings.get(DT_VERNEEDNUM, 0), table):
                if found := GLIBC.match(name):
                    versions.append((int(found[1]), int(found[2])))
        return Needs(self._machine, libraries, max(versions))

    def _dynamic(self) -> list[tuple[int, int]]:
        for kind, _, offset, _, _, size in self._segments:
            if kind == PT_DYNAMIC:
                return [struct.unpack_from("<QQ", self._data, at) for at in range(offset, offset + size, 16)]
        return []

    def _file_offset(self, address: int) -> int:
        for kind, _, offset, start, _, size in self._segments:
            if kind == PT_LOAD and start <= address < start + size:
                return int(address - start + offset)
        raise ValueError("an address outside every segment")

    def _text(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\0", offset)].decode("utf-8", "replace")

    def _versions(self, start: int, count: int, table: int) -> list[str]:
        names = []
        for _ in range(count):
            _, entries, _, first, following = struct.unpack_from("<HHIII", self._data, start)
            at = start + first
            for _ in range(entries):
                name, step = struct.unpack_from("<II", self._data, at + 8)
                names.append(self._text(table + name))
                at += step
            start += following
        return names
