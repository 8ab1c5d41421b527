"""Takes the guest's memory out of the stream in which QEMU writes a machine down, so that copies can share it as a file.

QEMU leaves memory out by itself only where it is mapped from a shared file, which that of a copy is not. The rest of the stream is
what a machine with such memory writes: it is loaded with `x-ignore-shared`. QEMU's migration/savevm.c and migration/ram.c are the
format's source. The monitor may have been taken over by its guest: all of it is checked and bounded. Blocking.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from atoll.model.errors import RuntimeFailed

PAGE_BYTES = 4096
STATE_BYTES_MAX = 256 << 20
"""Of everything but the guest's memory: devices, firmware, tables."""
TIMES_MAX = 4
"""A machine that stands still writes each page once; so many times over what it writes is taken."""
_MAGIC, _VERSION = 0x5145564D, 3
_FOOTER = 0x7E
_ZERO, _SIZES, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_CAPABILITIES = b"configuration/capabilities"
_NAMES_MAX = 256
_RUN_PAGES_MAX = 256


class _Splitter:
    def __init__(self, stream: BinaryIO, state: BinaryIO, ram: int, ram_bytes: int, block: bytes) -> None:
        self._read = stream.read
        self._state = state
        self._ram = ram
        self._ram_bytes = ram_bytes
        self._wanted = block
        self._block = b""
        self._kept_bytes = 0
        self._at = 0
        self._run: list[bytes] = []
        self._pages_left = TIMES_MAX * -(-ram_bytes // PAGE_BYTES)

    def take(self, count: int) -> bytes:
        data = self._read(count)
        if len(data) != count:
            raise RuntimeFailed("the machine's state was cut off", mend="take the snapshot again")
        return data

    def keep(self, data: bytes) -> bytes:
        self._kept_bytes += len(data)
        if self._kept_bytes > STATE_BYTES_MAX:
            raise RuntimeFailed(f"the machine's devices have more than {STATE_BYTES_MAX >> 20} MiB of state")
        self._state.write(data)
        return data

    def carry(self, count: int) -> bytes:
        return self.keep(self.take(count))

    def number(self) -> int:
        return int.from_bytes(self.carry(4), "big")

    def name(self) -> bytes:
        return self.carry(self.carry(1)[0])

    def run(self) -> None:
        if struct.unpack(">II", self.carry(8)) != (_MAGIC, _VERSION):
            raise _strange("it does not begin as one")
        memory: int | None = None
        while True:
            kind = self.carry(1)[0]
            match kind:
                case 7:  # _CONFIGURATION
                    size = self.number()
                    if size > _NAMES_MAX:
                        raise _strange("the machine's name is too long")
                    self.carry(size)
                case 5:  # _SUBSECTION
                    if self.name() != _CAPABILITIES:
                        raise _strange("an unknown part of the configuration")
                    self.number()
                    for _ in range(min(self.number(), _NAMES_MAX)):
                        self.name()
                case 1:  # _START
                    memory = self.number()
                    if self.name() != b"ram":
                        raise _strange("something beside memory is alive")
                    self.carry(8)
                    self.records()
                case 2 | 3:  # _PART, _END
                    if self.number() != memory:
                        raise _strange("a part of nothing that began")
                    self.records()
                case 4:  # _FULL: devices, to the end
                    while data := self._read(1 << 16):
                        self.keep(data)
                    return
                case _:
                    raise _strange(f"a section of kind {kind}")

    def records(self) -> None:
        """Read one part of the memory's section: its pages go into the file, all else stays."""
        take, keep = self.take, self.keep
        while True:
            head = take(8)
            word = int.from_bytes(head, "big")
            flags, address = word & (PAGE_BYTES - 1), word & ~(PAGE_BYTES - 1)
            if flags == _EOS:
                keep(head)
                break
            if flags & _SIZES:
                keep(head)
                self.sizes(address | flags & ~_SIZES)
                continue
            if flags & ~(_ZERO | _PAGE | _CONTINUE) or bool(flags & _ZERO) == bool(flags & _PAGE):
                raise _strange(f"a page of kind {flags:#x}")
            name = b""
            if not flags & _CONTINUE:
                size = take(1)
                name = size + take(size[0])
                self._block = name[1:]
            data = take(1 if flags & _ZERO else PAGE_BYTES)
            if self._block != self._wanted:
                keep(head + name + data)
                continue
            self._pages_left -= 1
            if self._pages_left < 0:
                raise RuntimeFailed(f"the machine wrote its memory down more than {TIMES_MAX} times over")
            if flags & _PAGE:
                self.page(address, data)
            elif data != b"\0":
                self.page(address, data * PAGE_BYTES)
        self.flush()
        if self.carry(1)[0] != _FOOTER:
            raise _strange("a part without an end")
        self.number()

    def sizes(self, total: int) -> None:
        for _ in range(_NAMES_MAX):
            if total <= 0:
                return
            name = self.name()
            size = int.from_bytes(self.carry(8), "big")
            self.carry(8)  # where it is
            if name == self._wanted and size != self._ram_bytes:
                raise _strange(f"{size} bytes of memory instead of {self._ram_bytes}")
            total -= size
        raise _strange("too many pieces of memory")

    def page(self, address: int, data: bytes) -> None:
        if address + PAGE_BYTES > self._ram_bytes:
            raise _strange("a page beyond the memory")
        if address != self._at + len(self._run) * PAGE_BYTES or len(self._run) >= _RUN_PAGES_MAX:
            self.flush()
            self._at = address
        self._run.append(data)

    def flush(self) -> None:
        if self._run:
            os.pwritev(self._ram, self._run, self._at)
            self._run = []


def split(stream: BinaryIO, state: BinaryIO, ram: int, *, ram_bytes: int, block: str) -> None:
    """Read a machine from `stream` to its end: the pages of the piece of memory `block` go to the file `ram`, the rest to `state`.

    `ram` is as large as the memory and empty: pages of zeros stay holes. Raises RuntimeFailed, OSError.
    """
    os.ftruncate(ram, ram_bytes)
    _Splitter(stream, state, ram, ram_bytes, block.encode()).run()


def _strange(what: str) -> RuntimeFailed:
    return RuntimeFailed(
        f"this QEMU writes machines down in a way that is not known here: {what}", mend="use a version of QEMU that is, as 7.2"
    )
