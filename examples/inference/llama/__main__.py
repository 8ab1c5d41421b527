"""`python3 -m llama`: serve the model at $MODEL. It listens at once, and is healthy when the model is loaded.

SIGTERM ends it cleanly: no new connection, what is being answered is answered, for at most $DRAIN seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import uvicorn

from llama.app import App, Served
from llama.arrays import find_device
from llama.engine import Engine, EngineThread, Limits
from llama.gguf import BadModel
from llama.model import Model

NAME = "smollm2-135m-instruct"


def find_model(path: Path) -> Path:
    """Return the model file: `path`, or the one in the directory `path`. Raises BadModel."""
    if path.is_file():
        return path
    found = sorted(path.rglob("*.gguf"))
    if len(found) != 1:
        raise BadModel(f"{path} holds {len(found)} .gguf files, and one is needed")
    return found[0]


def load() -> EngineThread:
    """Raises BadModel, OSError, RuntimeError (no GPU where one is demanded)."""
    began = time.monotonic()
    device = find_device()
    model = Model.load(find_model(Path(os.environ.get("MODEL", "/models"))), device)
    limits = Limits(
        rows=int(os.environ.get("ROWS", "8")),
        context=int(os.environ.get("CONTEXT", "1024")),
        waiting=int(os.environ.get("QUEUE_MAX", "64")),
    )
    engine = Engine(model, limits)
    engine.warm_up()
    print(f"{model.name} loaded on {device.gpu or 'the CPU'} in {time.monotonic() - began:.2f} s", flush=True)
    return EngineThread(engine)


async def serve() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes it while it serves, and raises it once more when it has ended
    served = Served(name=os.environ.get("MODEL_NAME", NAME))
    config = uvicorn.Config(
        App(served),
        host="0.0.0.0",
        port=int(os.environ.get("PORT", "8000")),
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=int(os.environ.get("DRAIN", "25")),
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        served.thread = await asyncio.to_thread(load)
        served.since = int(time.time())
    except (BadModel, OSError, RuntimeError) as error:
        served.gone = str(error)
        print(f"cannot load the model: {error}", file=sys.stderr, flush=True)
        server.should_exit = True
    await serving
    if served.thread is not None:
        served.thread.stop()
    return 1 if served.gone or (served.thread is not None and served.thread.failure is not None) else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(serve()))
