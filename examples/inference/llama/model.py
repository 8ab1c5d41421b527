"""The Llama architecture: RMSNorm, rotary positions, grouped-query attention, SwiGLU; for numpy and cupy alike.

`Cache` has a row of keys and values for each sequence under way. The rows in use are always the first ones, so that one step for
all of them works on plain slices: no gathering, no copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama.arrays import CPU, Device
from llama.gguf import BadModel, Gguf
from llama.tokenizer import Tokenizer

Array = Any


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    """Positions that the model was trained for."""
    epsilon: float
    frequency_base: float

    @classmethod
    def of(cls, model: Gguf) -> Shape:
        """Raises BadModel for another architecture."""
        keys = model.metadata
        if keys.get("general.architecture") != "llama":
            raise BadModel(f"the architecture {keys.get('general.architecture')!r} is not known here, only 'llama'")
        heads = keys["llama.attention.head_count"]
        return cls(
            layers=keys["llama.block_count"],
            width=keys["llama.embedding_length"],
            heads=heads,
            kv_heads=keys.get("llama.attention.head_count_kv", heads),
            head_width=keys["llama.embedding_length"] // heads,
            context=keys["llama.context_length"],
            epsilon=keys["llama.attention.layer_norm_rms_epsilon"],
            frequency_base=keys.get("llama.rope.freq_base", 10_000.0),
        )


@dataclass(frozen=True)
class Layer:
    attention_norm: Array
    queries_keys_values: Array
    """One matrix for the three: one multiplication instead of three."""
    attention_out: Array
    feed_norm: Array
    gate_up: Array
    down: Array


class Cache:
    """Keys and values of `rows` sequences of at most `context` tokens. Memory is taken as it is written to."""

    def __init__(self, device: Device, shape: Shape, rows: int, context: int) -> None:
        size = (shape.layers, rows, shape.kv_heads, context, shape.head_width)
        self.keys = device.xp.zeros(size, dtype=np.float32)
        self.values = device.xp.zeros(size, dtype=np.float32)
        self.rows = rows
        self.context = context

    def move(self, source: int, target: int, length: int) -> None:
        """Give row `target` what row `source` has in its first `length` positions."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]


class Model:
    """Weights on one device. `step` is the only computation; it may be called from one thread at a time."""

    def __init__(self, file: Gguf, device: Device = CPU) -> None:
        self.shape = shape = Shape.of(file)
        self.device = device
        self.tokenizer = Tokenizer(file)
        self.name: str = file.metadata.get("general.name", "model")

        def load(*names: str) -> Array:
            return device.xp.asarray(np.concatenate([file.tensor(f"{name}.weight") for name in names]))

        self.embedding = load("token_embd")
        self.output = load("output") if "output.weight" in file.names else self.embedding
        self.output_norm = load("output_norm")
        self.layers = [
            Layer(
                attention_norm=load(f"blk.{at}.attn_norm"),
                queries_keys_values=load(*(f"blk.{at}.attn_{name}" for name in "qkv")),
                attention_out=load(f"blk.{at}.attn_output"),
                feed_norm=load(f"blk.{at}.ffn_norm"),
                gate_up=load(f"blk.{at}.ffn_gate", f"blk.{at}.ffn_up"),
                down=load(f"blk.{at}.ffn_down"),
            )
            for at in range(shape.layers)
        ]
        turns = shape.frequency_base ** (-np.arange(0, shape.head_width, 2, dtype=np.float64) / shape.head_width)
        angles = np.arange(shape.context)[:, None] * turns
        self._cos = device.xp.asarray(np.cos(angles).astype(np.float32))
        self._sin = device.xp.asarray(np.sin(angles).astype(np.float32))

    @classmethod
    def load(cls, path: Path, device: Device = CPU) -> Model:
        """Raises BadModel, OSError."""
        return cls(Gguf(path), device)

    def new_cache(self, rows: int, context: int) -> Cache:
        return Cache(self.device, self.shape, rows, min(context, self.shape.context))

    def step(self, cache: Cache, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Array:
        """Return the logits after the last token of each sequence, shape (sequences, vocabulary).

        Sequence i is row `first + i` of the cache; its tokens (equally many of each) stand at positions `starts[i]` and on.
        """
        xp = self.device.xp
        count, length = len(tokens), len(tokens[0])
        positions = xp.asarray(np.asarray(starts)[:, None] + np.arange(length))
        end = max(starts) + length
        places = _Places(
            rows=slice(first, first + count),
            row=xp.arange(first, first + count)[:, None],
            positions=positions,
            cos=self._cos[positions][:, :, None],
            sin=self._sin[positions][:, :, None],
            end=end,
            hidden=(xp.arange(end) > positions[:, None, :, None]).astype(np.float32) * np.float32(-1e30),
        )
        x = self.embedding[xp.asarray(np.asarray(tokens))]
        for at, layer in enumerate(self.layers):
            x = x + self._attend(cache, at, layer, self._normed(x, layer.attention_norm), places)
            gate, up = xp.split(_times(self._normed(x, layer.feed_norm), layer.gate_up), 2, axis=-1)
            x = x + _times(gate / (1 + xp.exp(-gate)) * up, layer.down)
        return _times(self._normed(x[:, -1], self.output_norm), self.output)

    def _attend(self, cache: Cache, at: int, layer: Layer, x: Array, places: _Places) -> Array:
        xp, shape = self.device.xp, self.shape
        count, length, _ = x.shape
        mixed = _times(x, layer.queries_keys_values).reshape(count, length, -1, shape.head_width)
        queries, keys, values = xp.split(mixed, [shape.heads, shape.heads + shape.kv_heads], axis=2)
        queries = _rotated(xp, queries, places)
        all_keys, all_values = cache.keys[at], cache.values[at]
        all_keys[places.row, :, places.positions] = _rotated(xp, keys, places)
        all_values[places.row, :, places.positions] = values
        known = all_keys[places.rows, :, : places.end]
        # Queries of the heads that share keys stand below one another: (sequence, kv head, head in group × position, width).
        group = shape.heads // shape.kv_heads
        queries = queries.reshape(count, length, shape.kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
        scores = queries.reshape(count, shape.kv_heads, group * length, -1) @ known.swapaxes(-1, -2)
        scores = scores.reshape(count, shape.kv_heads, group, length, -1) * np.float32(1 / math.sqrt(shape.head_width))
        scores = scores + places.hidden[:, :, None]
        scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
        scores = (scores / scores.sum(axis=-1, keepdims=True)).reshape(count, shape.kv_heads, group * length, -1)
        seen = scores @ all_values[places.rows, :, : places.end]
        seen = seen.reshape(count, shape.kv_heads, group, length, -1).transpose(0, 3, 1, 2, 4)
        return _times(seen.reshape(count, length, shape.width), layer.attention_out)

    def _normed(self, x: Array, weight: Array) -> Array:
        xp = self.device.xp
        return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + np.float32(self.shape.epsilon)) * weight


@dataclass(frozen=True)
class _Places:
    """Where one step's tokens stand: the same for every layer."""

    rows: slice
    row: Array
    positions: Array
    cos: Array
    sin: Array
    end: int
    hidden: Array
    """0 where a token may look, a number that leaves nothing where what it would see comes later or is not there."""


def _rotated(xp: Any, x: Array, places: _Places) -> Array:
    """Turn each pair of neighbouring values by an angle that grows with the position (ggml's `NORM` order)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * places.cos - odd * places.sin, even * places.sin + odd * places.cos)
    return xp.stack(turned, axis=-1).reshape(x.shape)


def _times(x: Array, weight: Array) -> Array:
    """Multiply each row of `x` with `weight`, (out, in). With few rows BLAS is twice as fast this way round."""
    flat = x.reshape(-1, x.shape[-1])
    return (weight @ flat.T).T.reshape(*x.shape[:-1], -1)
