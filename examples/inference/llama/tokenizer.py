"""Byte-level BPE, as the model's file describes it: text to token numbers and back.

Text is first cut into words as GPT-2 does it, each digit for itself. The usual expression for that needs Unicode classes,
which `re` lacks: so each character is mapped to a letter that names its class, and the expression runs on those.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise

from llama.gguf import BadModel, Gguf

_CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
_SHAPE = re.compile(r"b?L+|b?O+|N|[bs]+(?![LO])|[bs]+")
"""Of classes: b a blank, s other white space, L letters, N digits, O all else."""
_CONTROL = 3
"""The type of tokens that are no text, such as `<|im_end|>`."""
WORDS_CACHED = 1 << 16
WORD_CHARS_MAX = 4_096
"""A longer run of one class is cut: merging takes time that grows with its square."""


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in the vocabulary: printable ones for themselves, others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shown = dict(zip(plain, map(chr, plain), strict=True))
    others = (byte for byte in range(256) if byte not in shown)
    shown |= {byte: chr(0x100 + at) for at, byte in enumerate(others)}
    return [shown[byte] for byte in range(256)]


_CHARACTER = _byte_characters()
_BYTE = {character: byte for byte, character in enumerate(_CHARACTER)}


@lru_cache(maxsize=1 << 16)
def _class(character: str) -> str:
    if character.isspace():
        return "b" if character == " " else "s"
    return {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "O")


def words(text: str) -> Iterator[str]:
    """Yield `text` in the pieces within which tokens are merged; together they are `text`."""
    shape = "".join(map(_class, text))
    at = 0
    while at < len(text):
        found = _CONTRACTION.match(text, at) or _SHAPE.match(shape, at)
        assert found is not None  # every class begins one of the alternatives
        end = min(found.end(), at + WORD_CHARS_MAX)
        yield text[at:end]
        at = end


class Tokenizer:
    """The vocabulary and merges of one model."""

    def __init__(self, model: Gguf) -> None:
        kind = (model.metadata.get("tokenizer.ggml.model"), model.metadata.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise BadModel(f"a tokenizer of kind {kind} is not known here, only ('gpt2', 'smollm')")
        self._texts: list[str] = model.metadata["tokenizer.ggml.tokens"]
        types: list[int] = model.metadata["tokenizer.ggml.token_type"]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._control = {number for number, type in enumerate(types) if type == _CONTROL}
        merges: list[str] = model.metadata["tokenizer.ggml.merges"]
        self._ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(merges)}
        self._word = lru_cache(maxsize=WORDS_CACHED)(self._merge)
        self.end: int = model.metadata["tokenizer.ggml.eos_token_id"]

    def __len__(self) -> int:
        return len(self._texts)

    def control(self, text: str) -> int:
        """Return the number of a control token. Raises BadModel when there is none."""
        number = self._numbers.get(text)
        if number is None or number not in self._control:
            raise BadModel(f"the model has no control token {text}")
        return number

    def is_control(self, number: int) -> bool:
        return number in self._control

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`. A control token's name in it is text like any other, so that nobody can forge a turn."""
        return [number for word in words(text) for number in self._word(word)]

    def decode(self, numbers: Iterable[int]) -> bytes:
        """Return what the tokens stand for: UTF-8, of which a single token may be a part only. Control tokens are nothing."""
        return b"".join(self._bytes(number) for number in numbers)

    def chat(self, turns: Iterable[tuple[str, str]]) -> list[int]:
        """Return a conversation of (role, text) as the model was taught it (ChatML), up to where its answer begins."""
        begin, end, line = self.control("<|im_start|>"), self.control("<|im_end|>"), self.encode("\n")
        numbers: list[int] = []
        for role, text in turns:
            numbers += [begin, *self.encode(f"{role}\n{text}"), end, *line]
        return [*numbers, begin, *self.encode("assistant\n")]

    def _bytes(self, number: int) -> bytes:
        if number in self._control:
            return b""
        return bytes(_BYTE[character] for character in self._texts[number])

    def _merge(self, word: str) -> tuple[int, ...]:
        """Merge the pair that was learnt first, everywhere, again and again, as the vocabulary was made."""
        parts = [_CHARACTER[byte] for byte in word.encode("utf-8", "replace")]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged: list[str] = []
            at = 0
            while at < len(parts):
                if at + 1 < len(parts) and (parts[at], parts[at + 1]) == best:
                    merged.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    merged.append(parts[at])
                    at += 1
            parts = merged
        return tuple(self._numbers[part] for part in parts)
