"""The process in which NVML runs: requests come in on descriptor 0 as lines of JSON, answers go out on it, one at a time.

NVML may hang in the kernel, crash, or be of another version than the driver; only this process has the harm. It imports
nothing of Atoll beside its own few modules, says nothing on any other descriptor, and dies with the process that started it.

A request is `{"id", "call", "arguments"}`; an answer `{"id", "result"}` or `{"id", "error": {"kind", …}}` where `kind` is `nvml`
(with `code`, `function`, `words` and the `library` that was loaded) or the code of an Atoll error (with `message` and `mend`).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

from atoll.devices.nvidia import partitioning, reading, waiting

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, library, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    die_with(parent)
    try:
        nvml = importlib.import_module(library)
    except ImportError as error:
        _reply({"id": 0, "error": {"kind": "unavailable", "message": f"the bindings of NVML cannot be loaded: {error}"}})
        return
    if mode == "events":
        waiting.wait(nvml, _reply, failure)
    else:
        serve(nvml)


def serve(nvml: Any) -> None:
    ready = False
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if not ready:
                nvml.nvmlInit()
                ready = True
            answer = {"id": request["id"], "result": _answer(nvml, request["call"], request["arguments"])}
        except Exception as error:  # noqa: BLE001 (the outer edge: whatever it was, the other side gets to know it)
            answer = {"id": request["id"], "error": failure(nvml, error)}
        _reply(answer)
        if not ready:
            return  # the next worker loads the library anew: it may be another by then


def _answer(nvml: Any, call: str, arguments: dict[str, Any]) -> Any:
    match call:
        case "hello":
            return None
        case "discover":
            return reading.discover(nvml)
        case "samples":
            return reading.samples(nvml)
        case "partitions":
            return partitioning.partitions(nvml, **arguments)
        case "make_partition":
            return partitioning.make(nvml, **arguments)
        case "remove_partition":
            return partitioning.remove(nvml, **arguments)
    raise ValueError(f"no such call: {call}")


def failure(nvml: Any, error: BaseException) -> dict[str, Any]:
    """Return an error as the answer's `error`."""
    if isinstance(error, nvml.NVMLError):
        function, trace = "", error.__traceback__
        while trace is not None:
            name = trace.tb_frame.f_code.co_name
            function, trace = name if name.startswith("nvml") else function, trace.tb_next
        return {"kind": "nvml", "code": error.value, "function": function, "words": str(error), "library": _loaded()}
    if isinstance(error, partitioning.Refusal):
        return {"kind": error.kind, "message": str(error), "mend": error.mend}
    return {"kind": "internal", "message": f"{type(error).__name__}: {error}"}


def die_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _loaded() -> str:
    """Return the file that was loaded as NVML: its name tells its version."""
    try:
        with open("/proc/self/maps") as maps:
            return next((line.split()[-1] for line in maps if "libnvidia-ml.so" in line), "")
    except OSError:
        return ""


def _reply(answer: dict[str, Any]) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    while data:
        try:
            data = data[os.write(0, data) :]
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
