"""Reads a model in GGUF, the file format of ggml: metadata, and tensors turned into plain arrays of float32.

Format: the GGUF specification of the ggml project, versions 2 and 3, little-endian. The file is mapped, not read: what several
processes on one machine open is in the page cache once.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
COUNT_MAX = 1 << 24
"""Entries in one array of the metadata, and tensors: what is beyond this is damage."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class BadModel(Exception):
    """The file is not a model that this code can use."""


class Gguf:
    """One file. `metadata` has its keys and values; `tensor` gives a tensor by name."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 4
        if self._data[:4] != MAGIC:
            raise BadModel(f"{path} is no GGUF file")
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise BadModel(f"{path} is damaged: {error}") from None

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise BadModel(f"GGUF of version {version}; 2 and 3 are known")
        tensors, pairs = self._count(), self._count()
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        self._tensors: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._string()
            dimensions = [self._scalar("Q") for _ in range(self._scalar("I"))]
            # ggml writes the fastest dimension first, numpy last
            self._tensors[name] = (tuple(reversed(dimensions)), self._scalar("I"), self._scalar("Q"))
        align = self.metadata.get("general.alignment", 32)
        self._base = (self._at + align - 1) // align * align

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as float32, rows first. Raises BadModel for one that is not there or in a form not known here."""
        if name not in self._tensors:
            raise BadModel(f"the model has no tensor {name}")
        shape, kind, offset = self._tensors[name]
        if kind not in _FORMS:
            raise BadModel(f"tensor {name} is in form {kind} of ggml's; known are {', '.join(map(str, sorted(_FORMS)))}")
        block, block_bytes, decode = _FORMS[kind]
        count = int(np.prod(shape))
        size = count // block * block_bytes
        start = self._base + offset
        if count % block or start + size > len(self._data):
            raise BadModel(f"tensor {name} is cut short")
        raw = np.frombuffer(self._data, dtype=np.uint8, count=size, offset=start)
        return decode(raw.reshape(-1, block_bytes)).reshape(shape)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize("<" + form)
        return value

    def _count(self) -> int:
        count: int = self._scalar("Q")
        if count > COUNT_MAX:
            raise BadModel(f"the file is damaged: {count} entries")
        return count

    def _string(self) -> str:
        size = self._scalar("Q")
        if size > len(self._data) - self._at:
            raise BadModel("the file is damaged: a string goes beyond its end")
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar("I"), self._count()
            return [self._value(inner) for _ in range(count)]
        return self._scalar(_SCALARS[kind])


# Each takes blocks as rows of bytes and returns rows of float32. Layouts: ggml-common.h and ggml-quants.c of the ggml project.


def _f32(rows: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = rows.view("<f4").astype(np.float32)
    return numbers


def _f16(rows: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = rows.view("<f2").astype(np.float32)
    return numbers


def _half(rows: np.ndarray, at: int) -> np.ndarray:
    """The half-precision number at byte `at` of each block, as a column."""
    return np.ascontiguousarray(rows[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low halves first, then high ones: how ggml packs 32 values into 16 bytes."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


def _q4_0(rows: np.ndarray) -> np.ndarray:
    return _half(rows, 0) * (_nibbles(rows[:, 2:]) - 8)


def _q4_1(rows: np.ndarray) -> np.ndarray:
    return _half(rows, 0) * _nibbles(rows[:, 4:]) + _half(rows, 2)


def _q8_0(rows: np.ndarray) -> np.ndarray:
    return _half(rows, 0) * rows[:, 2:].view(np.int8).astype(np.float32)


_FORMS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (1, 4, _f32),
    1: (1, 2, _f16),
    2: (32, 18, _q4_0),
    3: (32, 20, _q4_1),
    8: (32, 34, _q8_0),
}
"""ggml's number of a form → values in a block, its bytes, how it is read."""
