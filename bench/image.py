"""The image whose start is measured: one static program that writes down when its first instruction ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

from atoll.images import minimal

STAMP = Path(__file__).with_name("stamp.c")


def compile_stamp(directory: Path) -> Path:
    """Compile the measured process and return its path."""
    program = directory / "stamp"
    subprocess.run(["gcc", "-O2", "-static", "-o", str(program), str(STAMP)], check=True)
    return program


def docker_archive(directory: Path, name: str) -> Path:
    """Write a `docker save` archive with the program as `/stamp`, named `name` (REPOSITORY:TAG)."""
    program = compile_stamp(directory)
    return minimal.docker_archive(directory / "stamp.tar", name, program=program, target="/stamp", command=["/probe/t"])
