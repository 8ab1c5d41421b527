"""Programs off their device and back, over a stand-in for the driver's library that is built here: every call in its order."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from atoll.devices.nvidia import checkpoint
from atoll.devices.nvidia.checkpoint import CheckpointError, CheckpointUnsupported, CudaState
from atoll.devices.nvidia.hardware import NvidiaHardware
from atoll.model.errors import Unavailable, Unsupported

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler to build the stand-in")
PID = 4711
SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
/* Keeps the state (0 running, 1 locked, 2 checkpointed, 3 failed) in a file, writes each call down, fails where it is told to. */
static int now(void) {
    int s = 0;
    FILE *f = fopen(getenv("STATE"), "r"); if (f) { if (fscanf(f, "%d", &s) != 1) s = 0; fclose(f); } return s; }
static int step(const char *name, int from, int to) {
    FILE *f = fopen(getenv("CALLS"), "a"); fprintf(f, "%s ", name); fclose(f);
    const char *fails = getenv("FAILS");
    if (fails && !strcmp(fails, name)) return 2;
    if (now() != from) return 1;
    f = fopen(getenv("STATE"), "w"); fprintf(f, "%d", to); fclose(f);
    return 0;
}
int cuCheckpointProcessGetState(int pid, int *state) { if (pid != 4711) return 1; *state = now(); return 0; }
int cuCheckpointProcessLock(int pid, const unsigned *args) { return args[0] == 0 || args[0] > 60000 ? 1 : step("lock", 0, 1); }
int cuCheckpointProcessCheckpoint(int pid, void *args) { return step("checkpoint", 1, 2); }
int cuCheckpointProcessRestore(int pid, void *args) { return step("restore", 2, 1); }
int cuCheckpointProcessUnlock(int pid, void *args) { return step("unlock", 1, 0); }
int cuGetErrorString(int result, const char **words) { *words = result == 2 ? "out of memory" : "invalid argument"; return 0; }
"""


class Driver:
    """`environment` leads to the library; what fails is set in it."""

    def __init__(self, directory: Path, source: str = SOURCE) -> None:
        self._calls = directory / "calls"
        self._calls.touch()
        (directory / "cuda.c").write_text(source)
        library = directory / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(directory / "cuda.c")], check=True, capture_output=True)
        paths = {"LD_LIBRARY_PATH": str(directory), "STATE": str(directory / "state"), "CALLS": str(self._calls)}
        self.environment = {**os.environ, **paths}

    @property
    def calls(self) -> list[str]:
        """What was called since the last look."""
        calls = self._calls.read_text().split()
        self._calls.write_text("")
        return calls


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


async def test_a_program_is_stopped_then_taken_off_and_back_in_the_other_order(driver: Driver) -> None:
    await checkpoint.suspend(PID, driver.environment)
    assert driver.calls == ["lock", "checkpoint"]
    assert await checkpoint.state(PID, driver.environment) is CudaState.CHECKPOINTED
    await checkpoint.suspend(PID, driver.environment)
    assert driver.calls == [], "what is off already is left so"
    await checkpoint.resume(PID, driver.environment)
    assert driver.calls == ["restore", "unlock"]
    await checkpoint.resume(PID, driver.environment)
    assert driver.calls == []
    assert await checkpoint.state(PID, driver.environment) is CudaState.RUNNING


async def test_one_that_cannot_be_taken_off_is_let_go_again(driver: Driver) -> None:
    with pytest.raises(CheckpointError, match=r"cannot take it off its device \(process 4711\): out of memory") as caught:
        await checkpoint.suspend(PID, driver.environment | {"FAILS": "checkpoint"})
    assert driver.calls == ["lock", "checkpoint", "unlock"]
    assert caught.value.state is CudaState.RUNNING


async def test_one_that_finds_no_memory_stays_off_and_may_be_tried_again(driver: Driver) -> None:
    await checkpoint.suspend(PID, driver.environment)
    with pytest.raises(CheckpointError, match="out of memory") as caught:
        await checkpoint.resume(PID, driver.environment | {"FAILS": "restore"})
    assert caught.value.state is CudaState.CHECKPOINTED
    await checkpoint.resume(PID, driver.environment)
    assert await checkpoint.state(PID, driver.environment) is CudaState.RUNNING


async def test_one_that_an_earlier_try_left_stopped_is_let_go_on(driver: Driver) -> None:
    Path(driver.environment["STATE"]).write_text("1")
    await checkpoint.resume(PID, driver.environment)
    assert driver.calls == ["unlock"]


async def test_one_that_an_earlier_try_left_stopped_is_taken_off_all_the_same(driver: Driver) -> None:
    Path(driver.environment["STATE"]).write_text("1")
    await checkpoint.suspend(PID, driver.environment)
    assert driver.calls == ["checkpoint"]
    assert await checkpoint.state(PID, driver.environment) is CudaState.CHECKPOINTED


@pytest.mark.parametrize("move", [checkpoint.suspend, checkpoint.resume])
async def test_one_that_the_driver_says_has_failed_is_an_error(
    driver: Driver, move: Callable[[int, Mapping[str, str]], Awaitable[None]]
) -> None:
    Path(driver.environment["STATE"]).write_text("3")
    with pytest.raises(CheckpointError, match="has failed") as caught:
        await move(PID, driver.environment)
    assert (driver.calls, caught.value.state) == ([], CudaState.FAILED)


async def test_one_that_fails_while_it_is_taken_off_is_an_error(tmp_path: Path) -> None:
    driver = Driver(tmp_path, SOURCE.replace('step("checkpoint", 1, 2)', 'step("checkpoint", 1, 3)'))
    with pytest.raises(CheckpointError, match="has failed") as caught:
        await checkpoint.suspend(PID, driver.environment)
    assert caught.value.state is CudaState.FAILED


async def test_a_program_without_cuda_is_refused(driver: Driver) -> None:
    with pytest.raises(CheckpointError, match="invalid argument"):
        await checkpoint.suspend(PID + 1, driver.environment)


async def test_an_older_driver_and_none_at_all_are_told_from_one_that_would_not(tmp_path: Path) -> None:
    old = Driver(tmp_path, "int cuInit(int flags) { return 0; }\n")
    with pytest.raises(CheckpointUnsupported, match="570 or newer"):
        await checkpoint.suspend(PID, old.environment)


async def test_hardware_speaks_of_it_in_the_port_s_errors(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    old = Driver(tmp_path / "old", "int cuInit(int flags) { return 0; }\n")
    hardware = NvidiaHardware(root=tmp_path / "empty", environment=driver.environment)
    await hardware.suspend(PID)
    await hardware.resume(PID)
    assert driver.calls == ["lock", "checkpoint", "restore", "unlock"]
    with pytest.raises(Unsupported, match="cannot say how it stands"):  # it is no program of CUDA's, and was not touched
        await hardware.suspend(PID + 1)
    with pytest.raises(Unavailable):
        await hardware.resume(PID + 1)
    with pytest.raises(Unsupported):
        await NvidiaHardware(root=tmp_path / "empty", environment=old.environment).suspend(PID)
