"""Whether a runtime can run anything here: found out by running a program in it to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from atoll.model.errors import AtollError
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits, Runtime
from atoll.runtimes.native import shim_path

_LIMITS = Limits(cpu_milli=1000, memory_bytes=64 << 20, disk_bytes=4 << 20, pids=64)
_CODE = 2
"""How the shim ends when it is given nothing to do."""


async def run_once(runtime: Runtime, directory: Path, deadline_s: float) -> str:
    """Run a program to its end in an instance of `runtime`, which is closed then. Return why that failed, or nothing."""
    id = f"probe-{os.getpid()}-{directory.name[-8:]}".replace("_", "-")
    layer, fifo = directory / "layer", directory / "output"
    layer.mkdir()
    shutil.copy(shim_path(), layer / "probe")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    box = Box(
        id=id,
        directory=directory / "box",
        image=Image(reference="probe", digest="", config=ImageConfig(), layers=(layer,)),
        argv=("/probe",),
        env=(),
        workdir="/",
        user="",
        hostname="probe",
        limits=_LIMITS,
        stdout=fifo,
        stderr=fifo,
    )
    try:
        async with asyncio.timeout(deadline_s):
            await runtime.create(box)
            await runtime.start(id)
            code = (await runtime.wait(id)).code
        return "" if code == _CODE else f"a program ended with {code}"
    except TimeoutError:
        return f"a program did not run to its end within {deadline_s:.0f} s"
    except AtollError as error:
        return f"{error}; {error.mend}" if error.mend else str(error)
    finally:
        with contextlib.suppress(AtollError):
            await runtime.delete(id)
        await runtime.close()
        os.close(reader)
