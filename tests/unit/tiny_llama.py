"""A Llama of random numbers in a GGUF file of some kilobytes: the example's code runs on it as on a real model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEADS, KV_HEADS, FEED, LAYERS, CONTEXT = 32, 4, 2, 48, 2, 128
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_characters() -> list[str]:
    """Return the characters that stand for bytes in byte-level vocabularies (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def metadata() -> dict[str, Any]:
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = [*CONTROLS, *byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    return {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FEED,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(tokens) - len(CONTROLS)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
    }


def weights(seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    vocabulary = len(metadata()["tokenizer.ggml.tokens"])
    kv_width = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, WIDTH), "output_norm": (WIDTH,)}
    for at in range(LAYERS):
        shapes |= {
            f"blk.{at}.attn_norm": (WIDTH,),
            f"blk.{at}.attn_q": (WIDTH, WIDTH),
            f"blk.{at}.attn_k": (kv_width, WIDTH),
            f"blk.{at}.attn_v": (kv_width, WIDTH),
            f"blk.{at}.attn_output": (WIDTH, WIDTH),
            f"blk.{at}.ffn_norm": (WIDTH,),
            f"blk.{at}.ffn_gate": (FEED, WIDTH),
            f"blk.{at}.ffn_up": (FEED, WIDTH),
            f"blk.{at}.ffn_down": (WIDTH, FEED),
        }
    return {f"{name}.weight": random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, pairs: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    """Write a file of version 3; a tensor is its shape (rows first), ggml's number of its form, and its bytes."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs))
    head += b"".join(_string(key) + _typed(value) for key, value in pairs.items())
    data = b""
    for name, (shape, form, content) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), form, len(data))
        data += content + b"\0" * (-len(content) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def write_tiny(path: Path, seed: int = 1) -> Path:
    return write_gguf(path, metadata(), {name: (array.shape, 0, array.tobytes()) for name, array in weights(seed).items()})


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    kind, data = _value(value)
    return struct.pack("<I", kind) + data


def _value(value: Any) -> tuple[int, bytes]:
    match value:
        case str():
            return 8, _string(value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case list():
            kind = _value(value[0])[0]
            return 9, struct.pack("<IQ", kind, len(value)) + b"".join(_value(each)[1] for each in value)
    raise TypeError(value)
