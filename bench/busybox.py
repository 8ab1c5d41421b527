"""One image of busybox, and boxes of it whose output is read by nobody: what benches of runtimes start again and again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Box, Limits

BUSYBOX = Path("/bin/busybox")


class Boxes:
    """Makes boxes below `directory`, which must be there. Call `close` when their instances are gone."""

    def __init__(self, directory: Path, limits: Limits) -> None:
        self._directory = directory
        self._limits = limits
        layer = directory / "layer"
        for part in ("bin", "etc", "tmp"):
            (layer / part).mkdir(parents=True)
        shutil.copy(BUSYBOX, layer / "bin/busybox")
        for applet in ("sleep", "echo"):
            (layer / "bin" / applet).symlink_to("busybox")
        self._image = Image(reference="bench", digest="sha256:0", config=ImageConfig(), layers=(layer,))
        self._readers: dict[str, list[int]] = {}

    def make(self, id: str, name: str = "") -> Box:
        """Return a box that sleeps, with pipes for its output. `name` is its hostname and directory; else `id`."""
        name = name or id
        fifos = []
        for stream in ("out", "err"):
            path = self._directory / f"{name}.{stream}"
            os.mkfifo(path)
            self._readers.setdefault(name, []).append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            fifos.append(path)
        return Box(
            id=id,
            directory=self._directory / "instances" / name,
            image=self._image,
            argv=("sleep", "100000"),
            env=(),
            workdir="/",
            user="",
            hostname=name,
            limits=self._limits,
            stdout=fifos[0],
            stderr=fifos[1],
        )

    def forget(self, name: str) -> None:
        """Let go of the pipes of a box that is gone, so that another of its name can be made."""
        for fd in self._readers.pop(name, ()):
            os.close(fd)
        for stream in ("out", "err"):
            (self._directory / f"{name}.{stream}").unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all pipes. Safe to repeat."""
        for name in list(self._readers):
            self.forget(name)
