"""One small app on a real `atoll up`: what tests of sleeping and of scaling begin with, and how they wait."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atoll.entry.scratch import ScratchAtoll
from atoll.images.minimal import docker_archive

BUSYBOX = Path("/bin/busybox")
NEEDS = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="needs the package busybox-static"),
]
WAIT_S = 60.0


@contextlib.contextmanager
def deployed(prefix: str, spec: str, tmp_path: Path) -> Iterator[ScratchAtoll]:
    """Start an Atoll, and deploy `spec` there, in which `{image}` stands for one with busybox alone."""
    with ScratchAtoll(prefix) as atoll:
        archive = docker_archive(tmp_path / "busybox.tar", "busybox:1", program=BUSYBOX, target=str(BUSYBOX))
        image = atoll.atoll_json("image", "import", str(archive), "--name", "busybox", "--tag", "1")["image"]
        (tmp_path / "atoll.toml").write_text(spec.format(image=image))
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
        yield atoll


def wait_for(holds: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """Wait until `holds`, or fail with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)
