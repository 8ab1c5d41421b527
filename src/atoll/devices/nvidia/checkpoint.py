"""Takes a running CUDA program off its device and puts it back: its memory waits in the node's RAM, the device is free meanwhile.

The driver does it (CUDA driver API, group "CUDA Checkpointing", drivers from 570 on): lock, checkpoint; then restore, unlock. The
calls may wait for the program's kernels and copy all of its memory, so each is made by a process of its own that can be given up:
`python -m atoll.devices.nvidia.checkpoint ACTION PID`, which prints one JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import json
import sys
from collections.abc import Mapping
from subprocess import DEVNULL, PIPE
from typing import Any

LIBRARY = "libcuda.so.1"
LOCK_MS_MAX = 5_000
"""How long a program may take to come to a place where it can be stopped."""
CALL_S_MAX = 120.0
"""Deadline of one action: some 2 GB/s were measured to the node's memory, so this is enough for a device of 140 GB."""
_ARGUMENTS_BYTES = 64


class CudaState(enum.StrEnum):
    """What the driver says of a program (CUprocessState)."""

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    FAILED = "failed"


_STATES = tuple(CudaState)


class CheckpointError(Exception):
    """The driver would not; the message has its words. The program runs on unless `state` says otherwise."""

    def __init__(self, message: str, state: CudaState | None) -> None:
        super().__init__(message)
        self.state = state


class CheckpointUnsupported(CheckpointError):
    """No driver here can, whatever the program, or it cannot tell how this one stands. The program was not touched."""


async def suspend(pid: int, environment: Mapping[str, str] | None = None) -> None:
    """Take the program off its device. Its CUDA calls wait until `resume`. One that is off already is left so; safe to repeat.

    `environment`, that of this process where absent, is where the driver's library is looked for (LD_LIBRARY_PATH).
    Raises CheckpointUnsupported, CheckpointError: it has been let go again, and runs.
    """
    await _ask("suspend", pid, environment)


async def resume(pid: int, environment: Mapping[str, str] | None = None) -> None:
    """Put the program back on the device that it had. One that runs is left so; safe to repeat.

    Raises CheckpointError, for a device without enough free memory too; it then stays off, and may be tried again.
    """
    await _ask("resume", pid, environment)


async def state(pid: int, environment: Mapping[str, str] | None = None) -> CudaState:
    """Return how a program stands. Raises CheckpointError where it uses no CUDA, or the driver cannot tell."""
    return CudaState((await _ask("state", pid, environment))["state"])


async def _ask(action: str, pid: int, environment: Mapping[str, str] | None) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, action, str(pid)]
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, env=environment)
    try:
        async with asyncio.timeout(CALL_S_MAX):
            out, _ = await process.communicate()
    except TimeoutError:
        raise CheckpointError(f"the driver did not {action} process {pid} within {CALL_S_MAX:.0f} s", None) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # not waited for: it may hang in the driver
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        raise CheckpointError(f"the driver's library ended the attempt to {action} process {pid}", None) from None
    if "error" in answer:
        kind = CheckpointUnsupported if answer["unsupported"] else CheckpointError
        raise kind(answer["error"], CudaState(answer["state"]) if answer.get("state") else None)
    return answer


class _Driver:
    def __init__(self, pid: int) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._state = self._library.cuCheckpointProcessGetState
        except OSError:
            raise CheckpointUnsupported(f"there is no {LIBRARY}: is the driver installed?", None) from None
        except AttributeError:
            raise CheckpointUnsupported("this driver cannot take a program off its device (570 or newer can)", None) from None
        self._pid = pid

    def state(self) -> CudaState:
        value = ctypes.c_int(-1)
        self._must(self._state(self._pid, ctypes.byref(value)), "say how it stands")
        return _STATES[value.value] if 0 <= value.value < len(_STATES) else CudaState.FAILED

    def call(self, name: str, what: str) -> None:
        arguments = ctypes.create_string_buffer(_ARGUMENTS_BYTES)
        if name == "Lock":
            ctypes.memmove(arguments, ctypes.byref(ctypes.c_uint(LOCK_MS_MAX)), 4)
        self._must(getattr(self._library, f"cuCheckpointProcess{name}")(self._pid, arguments), what)

    def _must(self, result: int, what: str) -> None:
        if result == 0:
            return
        words = ctypes.c_char_p()
        self._library.cuGetErrorString(result, ctypes.byref(words))
        said = words.value.decode() if words.value else f"error {result}"
        raise CheckpointError(f"cannot {what} (process {self._pid}): {said}", None)


def _act(action: str, pid: int) -> CudaState:
    driver = _Driver(pid)
    try:
        now = driver.state()
    except CheckpointError as error:
        if action == "suspend":  # it was not touched, and cannot be
            raise CheckpointUnsupported(str(error), None) from None
        raise
    if action != "state" and now is CudaState.FAILED:
        raise CheckpointError(f"cannot {action} it (process {pid}): the driver says that it has failed", None)
    if action == "suspend" and now in (CudaState.RUNNING, CudaState.LOCKED):
        if now is CudaState.RUNNING:  # else an earlier try was ended half way
            driver.call("Lock", "stop it")
        try:
            driver.call("Checkpoint", "take it off its device")
        except CheckpointError:
            driver.call("Unlock", "let it go again")
            raise
    elif action == "resume":
        if now is CudaState.CHECKPOINTED:
            driver.call("Restore", "put it back on its device")
        if now is not CudaState.RUNNING:
            driver.call("Unlock", "let it go on")
    after = driver.state()
    if action != "state" and after is CudaState.FAILED:
        raise CheckpointError(f"cannot {action} it (process {pid}): it has failed meanwhile", None)
    return after


def main() -> int:
    """Do one action and print its outcome."""
    action, pid = sys.argv[1], int(sys.argv[2])
    try:
        print(json.dumps({"state": _act(action, pid)}))
    except CheckpointError as error:
        left: CudaState | None = None
        with contextlib.suppress(CheckpointError):
            left = _Driver(pid).state()
        print(json.dumps({"error": str(error), "state": left, "unsupported": isinstance(error, CheckpointUnsupported)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
