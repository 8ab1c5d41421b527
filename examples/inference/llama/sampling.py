"""From logits to the next token, and from tokens to text that may be given out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CANDIDATES = 256
"""Tokens that are sorted at first; together they nearly always have more than `top_p`."""


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """0 takes the likeliest token, always."""
    top_p: float = 1.0
    """Only the likeliest tokens that together are so likely are drawn from."""
    seed: int | None = None


class Sampler:
    """Draws the tokens of one answer; with a seed, the same ones each time."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def draw(self, logits: np.ndarray) -> int:
        sampling = self._sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        scaled = (logits - logits.max()).astype(np.float64) / sampling.temperature
        weights = np.exp(scaled)
        weights /= weights.sum()
        if sampling.top_p >= 1:
            return int(self._random.choice(len(weights), p=weights))
        tokens = _likeliest(weights, min(CANDIDATES, len(weights)))
        if weights[tokens].sum() < sampling.top_p:
            tokens = _likeliest(weights, len(weights))
        # The one that reaches top_p is in, so that there is always one.
        kept = tokens[: int(np.searchsorted(np.cumsum(weights[tokens]), sampling.top_p)) + 1]
        return int(self._random.choice(kept, p=weights[kept] / weights[kept].sum()))


def _likeliest(weights: np.ndarray, count: int) -> np.ndarray:
    found = np.argpartition(weights, -count)[-count:]
    return found[np.argsort(-weights[found], kind="stable")]


class Text:
    """An answer's text as it grows: whole characters only, and nothing from where a stop word begins."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = [word for word in stop if word]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def add(self, data: bytes, *, last: bool = False) -> str:
        """Return what may be given out now; what may be the beginning of a stop word is held back, until `last`."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, last)
        cut = min((at for word in self._stop if (at := text.find(word)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            self._held = ""
            return text[:cut]
        held = 0 if last else max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, word: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `word`."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:size])), 0)
