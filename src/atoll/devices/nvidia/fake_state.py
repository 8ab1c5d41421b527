"""The state that the fake of NVML shares between processes: a file, its faults, and handles that lead into it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml  # type: ignore[import-untyped]

VARIABLE = "ATOLL_FAKE_NVML"
EVENTS = "events"
STATE = "state.json"
started: list[int] = []
"""How many devices this process saw at its start; empty before."""
DEVICE, PART, INSTANCE, COMPUTE = 0x1000, 0x10000, 0x100000, 0x1000000
"""Handles are numbers: a device's place, or place and id of what is in it. At most 14 devices and partitions."""


def directory() -> Path:
    return Path(os.environ[VARIABLE])


def load() -> Any:
    return json.loads((directory() / STATE).read_text())


@contextmanager
def change() -> Iterator[Any]:
    """Change the driver's state: one process at a time, all or nothing."""
    with open(directory() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = load()
        yield state
        fresh = directory() / f"{STATE}.{os.getpid()}"
        fresh.write_text(json.dumps(state))
        fresh.replace(directory() / STATE)


def call(function: Callable[..., Any]) -> Callable[..., Any]:
    """As every entry of NVML: what is asked to go wrong does, and nothing works before `nvmlInit`."""

    def entry(*arguments: Any, **named: Any) -> Any:
        for name in (function.__name__, f"{function.__name__}@{_named(arguments)}"):
            fault = _take_fault(name)
            if fault is not None:
                _suffer(fault)
        if not started and function.__name__ != "nvmlInit":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return function(*arguments, **named)

    # The worker tells which function failed by the name of its code, as the bindings' own have it.
    entry.__code__ = entry.__code__.replace(co_name=function.__name__)
    return functools.wraps(function)(entry)


def _take_fault(name: str) -> dict[str, Any] | None:
    if name not in load()["faults"]:
        return None
    with change() as state:
        fault: dict[str, Any] | None = state["faults"].get(name)
        if fault is not None and fault["times"] > 0:
            fault["times"] -= 1
            if not fault["times"]:
                del state["faults"][name]
    return fault


def _named(arguments: tuple[Any, ...]) -> str:
    """Return the device that a call is about: its first argument is a handle, or a place; empty for none."""
    first = arguments[0] if arguments else -1
    place = first if isinstance(first, int) else _place(first) if isinstance(first, ctypes._Pointer) else -1
    devices = load()["devices"]
    return str(devices[place]["id"]) if 0 <= place < len(devices) else ""


def _suffer(fault: dict[str, Any]) -> None:
    match fault["kind"]:
        case "hang":
            # Signals of a terminal do not end it either: only the kernel's own does.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
            while True:
                signal.pause()
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
            signal.pause()
        case _:
            raise pynvml.NVMLError(fault["code"])


def pointer(kind: Any, number: int) -> Any:
    return ctypes.cast(number, kind)


def number_of(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _place(handle: Any) -> int:
    return number_of(handle) % PART // DEVICE - 1


def look(handle: Any, state: Any = None) -> Any:
    """Return a device's state. A handle of a partition leads to its device."""
    device = (state or load())["devices"][_place(handle)]
    if device["lost"]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    return device


def absent() -> pynvml.NVMLError:
    return pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def part_of(device: Any, handle: Any) -> Any:
    """Return the GPU instance that a handle of a partition, a GPU instance or a compute instance leads to."""
    id = number_of(handle) % COMPUTE // INSTANCE if number_of(handle) >= INSTANCE else number_of(handle) // PART
    for instance in device["instances"]:
        if instance["id"] == id:
            return instance
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
