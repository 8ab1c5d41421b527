"""The driver's files are looked for once, and again when something has changed where they can be."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from test_devices_libraries import VERSION, install

from atoll.devices.known_files import KEPT_MAX, SETTLED_S, KnownFiles
from atoll.devices.libraries import driver_files
from atoll.model.errors import Unsupported
from atoll.model.spec import GpuCapability

COMPUTE, UTILITY = GpuCapability.COMPUTE, GpuCapability.UTILITY
DIRECTORY = "usr/lib/x86_64-linux-gnu"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "node"
    load(root, VERSION)
    install(root, DIRECTORY, "libcuda.so", "libnvidia-ml.so", "libnvidia-cfg.so")
    return root


def load(root: Path, version: str) -> None:
    """Have the kernel run this driver."""
    (root / "proc/driver/nvidia").mkdir(parents=True, exist_ok=True)
    (root / "proc/driver/nvidia/version").write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  x\n")


def settled() -> float:
    """Long after all that the test does."""
    return time.time() + 100 * SETTLED_S


def test_what_is_found_is_what_a_search_finds_and_is_found_once(root: Path) -> None:
    known = KnownFiles(settled)
    first = known.find([COMPUTE, UTILITY], root)
    assert first == driver_files([COMPUTE, UTILITY], root)
    assert known.find([UTILITY, COMPUTE], root) is first
    assert known.find([UTILITY], root) == driver_files([UTILITY], root) != first


def test_a_file_that_comes_goes_or_is_replaced_is_seen(root: Path) -> None:
    known = KnownFiles(settled)
    first = known.find([COMPUTE, UTILITY], root)
    install(root, DIRECTORY, "libnvidia-ptxjitcompiler.so")
    more = known.find([COMPUTE, UTILITY], root)
    assert len(more.mounts) == len(first.mounts) + 1
    install(root, "usr/bin", "unrelated.so")  # makes the directory of programs
    (root / "usr/bin/nvidia-smi").write_text("#!/bin/sh\n")
    assert {mount.target for mount in known.find([COMPUTE, UTILITY], root).mounts} > {mount.target for mount in more.mounts}
    (root / DIRECTORY / f"libcuda.so.{VERSION}").unlink()
    with pytest.raises(Unsupported, match="libcuda"):
        known.find([COMPUTE, UTILITY], root)
    install(root, DIRECTORY, "libcuda.so")
    assert known.find([COMPUTE, UTILITY], root) == driver_files([COMPUTE, UTILITY], root)


def test_a_driver_in_an_unusual_place_is_watched_there(root: Path) -> None:
    """It is found through a link; what its own directory has is not in any usual place."""
    odd = root / "opt/driver"
    (odd).mkdir(parents=True)
    real = root / DIRECTORY / f"libcuda.so.{VERSION}"
    real.rename(odd / real.name)
    real.symlink_to(f"/opt/driver/{real.name}")
    known = KnownFiles(settled)
    assert known.find([COMPUTE], root).mounts[0].source == f"/opt/driver/{real.name}"
    (odd / real.name).unlink()
    with pytest.raises(Unsupported, match="libcuda"):
        known.find([COMPUTE], root)


def test_another_kernel_driver_is_another_search(root: Path) -> None:
    known = KnownFiles(settled)
    assert known.find([UTILITY], root).version == VERSION
    load(root, "999.9")
    with pytest.raises(Unsupported, match=r"999\.9"):
        known.find([UTILITY], root)
    load(root, VERSION)
    assert known.find([UTILITY], root).version == VERSION


def test_what_changed_a_moment_ago_is_not_trusted_yet(root: Path) -> None:
    known = KnownFiles()
    assert known.find([UTILITY], root) is not known.find([UTILITY], root)


def test_as_many_as_are_kept_and_no_more(root: Path) -> None:
    known = KnownFiles(settled)
    roots = [root / "proc/.." if n == 0 else root / "./" / f"x{n}/.." for n in range(KEPT_MAX + 1)]
    for n in range(1, KEPT_MAX + 1):
        (root / f"x{n}").mkdir()
    found = [known.find([UTILITY], each) for each in roots]
    assert known.find([UTILITY], roots[-1]) is found[-1]
    assert known.find([UTILITY], roots[0]) is not found[0]
