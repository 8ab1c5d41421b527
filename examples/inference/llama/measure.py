"""`python3 -m llama.measure`: tokens per second of this machine, by how many answers are under way at once.

Prints one line of JSON for each. The answers are `--tokens` long, after a prompt of `--prompt` tokens; reading the prompts is not
part of the time. $MODEL and $DEVICE as for the server.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from llama.__main__ import find_model
from llama.arrays import find_device
from llama.model import Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(os.environ.get("MODEL", "/models")))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    device = find_device()
    began = time.perf_counter()
    model = Model.load(find_model(options.model), device)
    load_s = time.perf_counter() - began
    prompt = [100 + at for at in range(options.prompt)]
    for rows in options.rows:
        cache = model.new_cache(rows, options.prompt + options.tokens + 1)
        began = time.perf_counter()
        for row in range(rows):
            logits = device.to_host(model.step(cache, row, [prompt], [0]))
        prompt_s = time.perf_counter() - began
        last = [[int(logits[0].argmax())]] * rows
        began = time.perf_counter()
        for at in range(options.tokens):
            logits = device.to_host(model.step(cache, 0, last, [options.prompt + at] * rows))
            last = [[int(row.argmax())] for row in logits]
        took_s = time.perf_counter() - began
        found = {
            "device": device.gpu or "cpu",
            "load_s": round(load_s, 2),
            "rows": rows,
            "prompt_tokens_per_s": round(rows * options.prompt / prompt_s, 1),
            "tokens_per_s": round(rows * options.tokens / took_s, 1),
            "step_ms": round(took_s / options.tokens * 1000, 2),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
