"""The layer with pip's packages, installed by this machine's pip for the image's Python: wheels only, so that nothing is run."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from atoll.images.command import Finished, run_tool
from atoll.images.layer import LayerBlob, LayerWriter
from atoll.images.steps import StepCache, StepResult
from atoll.images.threads import in_thread
from atoll.images.tree import EPOCH, add_tree
from atoll.model.errors import AtollError, ImageError, Invalid, Unavailable, Unsupported

PIP_DEADLINE_S = 1800.0
GLIBC = {"bullseye": 31, "bookworm": 36, "trixie": 41}
"""The minor version of each release's glibc 2.x, which says what wheels its images can load."""
GLIBC_MIN = 17
MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "riscv64": "riscv64"}
_UNKNOWN = re.compile(
    r"No matching distribution found for (.+)|Invalid requirement: ?'?([^':]+)"
    r"|Could not find a version that satisfies.*?requirement (\S+)"
)
_DIRECT = re.compile(r"(?:[\w.-]+\s*(?:\[[^\]]*\])?\s*@\s*)?(\S*[:/]\S*)(?:\s.*)?")
"""A requirement that is no name but a place; pip takes `PLACE` and `NAME @ PLACE`."""
_SOURCE = "only wheels are installed"
_MEND = "name a version that comes as a wheel, or the URL of one; `pip wheel` makes it of a source that you trust"
_GUARD = f"""
import errno, sys

def refuse(event, args):
    if event == "subprocess.Popen" or event in ("os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn"):
        raise OSError(errno.ECANCELED, "{_SOURCE}")

sys.addaudithook(refuse)
"""
"""Python begins with it in pip's process: what is no wheel is fetched and built by other programs, also what a wheel requires."""


async def make_pip(
    cache: StepCache,
    key: str,
    *,
    requirements: Sequence[str],
    python: str,
    suite: str,
    architecture: str,
    on_line: Callable[[str], None],
) -> StepResult:
    """Build the layer and keep it under `key`. `python` is the image's version (`3.11`); pip's own configuration counts.

    Raises Invalid for an unknown package and for one that only comes as source, Unavailable without an index, Unsupported
    without pip.
    """
    for requirement in requirements:
        check_wheel(requirement)
    same = f"{sys.version_info.major}.{sys.version_info.minor}" == python
    with cache.workplace() as work:
        site = work / f"root/usr/local/lib/python{python}/dist-packages"
        site.mkdir(parents=True)
        (work / "tmp").mkdir()
        (work / "guard").mkdir()
        (work / "guard/sitecustomize.py").write_text(_GUARD)
        argv = [*_pip(), "install", "--target", str(site), "--no-compile", "--progress-bar", "off"]
        argv += ["--disable-pip-version-check", "--no-input", "--no-warn-script-location", "--root-user-action", "ignore"]
        argv.append("--only-binary=:all:")
        if not same:
            argv += _foreign(python, suite, architecture)
        env = {
            **os.environ,
            "PIP_USER": "0",
            "PIP_REQUIRE_VIRTUALENV": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(work / "guard"), os.environ.get("PYTHONPATH")))),
            "TMPDIR": str(work / "tmp"),
            "SOURCE_DATE_EPOCH": str(EPOCH),
        }
        finished = await run_tool([*argv, "--", *requirements], env=env, deadline_s=PIP_DEADLINE_S, on_line=on_line)
        if finished.status != 0:
            raise _failure(finished)
        await in_thread(lambda: _settle(site, work / "root/usr/local/bin"))
        if same:
            await _compile(site, python, on_line)
        for path in (work / "root").rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        layer = work / "layer"
        return cache.keep(key, StepResult(await in_thread(lambda: _pack(work / "root", layer))), layer)


def check_wheel(requirement: str) -> None:
    """Raise Invalid for a requirement that names a place (of a repository, a file, a directory) where no wheel is."""
    direct = _DIRECT.fullmatch(requirement.partition(";")[0].strip())
    if direct is None:
        return
    place = urlsplit(direct[1])
    path = unquote(place.path)
    if path.endswith(".whl") and place.scheme in ("http", "https", "file", "") and not Path(path).is_dir():
        return
    raise Invalid(f"build.pip: {requirement!r} is no wheel, and {_SOURCE}", field="build.pip", mend=_MEND)


def _pip() -> list[str]:
    """Return this interpreter's pip, or the machine's."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        raise Unsupported("build.pip needs pip on this machine", mend="apt-get install python3-pip", field="build.pip")
    return [found]


def _foreign(python: str, suite: str, architecture: str) -> list[str]:
    """Return the options that let pip choose wheels for another Python than its own."""
    machine = MACHINES.get(architecture, architecture)
    newest = GLIBC.get(suite, min(GLIBC.values()))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, GLIBC_MIN - 1, -1)]
    platforms += [f"manylinux2014_{machine}", f"linux_{machine}"]
    digits = python.replace(".", "")
    options = ["--implementation", "cp", "--python-version", python]
    for abi in (f"cp{digits}", "abi3", "none"):
        options += ["--abi", abi]
    for platform in platforms:
        options += ["--platform", platform]
    return options


def _settle(site: Path, programs: Path) -> None:
    """Move programs to where PATH finds them, run by the image's Python, and correct the packages' records of them."""
    moved: dict[str, bytes] = {}
    if (site / "bin").is_dir():
        programs.mkdir(parents=True)
        for program in sorted((site / "bin").iterdir()):
            data = program.read_bytes()
            first, newline, rest = data.partition(b"\n")
            if first.startswith(b"#!") and b"python" in first:
                data = b"#!/usr/bin/python3" + newline + rest
            elif first == b"#!/bin/sh" and rest.startswith(b"'''exec' "):  # pip's form for an interpreter with a long path
                data = b"#!/usr/bin/python3\n" + rest.split(b"\n", 2)[2]
            target = programs / program.name
            target.write_bytes(data)
            target.chmod(0o755)
            moved[program.name] = data
        shutil.rmtree(site / "bin")
    for record in sorted(site.glob("*.dist-info/RECORD")):
        rows = [_row(row, moved) for row in csv.reader(io.StringIO(record.read_text()))]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(sorted(rows))
        record.write_text(text.getvalue())


def _row(row: list[str], moved: dict[str, bytes]) -> list[str]:
    name = row[0].rpartition("/")[2] if row else ""
    if row and row[0].rpartition("/")[0].endswith("bin") and row[0].startswith("../") and name in moved:
        digest = base64.urlsafe_b64encode(hashlib.sha256(moved[name]).digest()).rstrip(b"=").decode()
        return [f"../../../bin/{name}", f"sha256={digest}", str(len(moved[name]))]
    return row


async def _compile(site: Path, python: str, on_line: Callable[[str], None]) -> None:
    """Compile the packages, so that an instance need not on each start; a file that does not compile is left as it is."""
    argv = [sys.executable, "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    argv += ["-s", str(site), "-p", f"/usr/local/lib/python{python}/dist-packages", str(site)]
    await run_tool(argv, env={**os.environ, "PYTHONHASHSEED": "0"}, deadline_s=PIP_DEADLINE_S, on_line=on_line)


def _pack(root: Path, target: Path) -> LayerBlob:
    writer = LayerWriter(target)
    try:
        add_tree(writer, root)
        return writer.close()
    finally:
        writer.abandon()


def _failure(finished: Finished) -> AtollError:
    words = finished.last("ERROR: ")
    if _SOURCE in finished.output:
        return Invalid(f"build.pip: {_SOURCE}, and something that these packages require is none", field="build.pip", mend=_MEND)
    if finished.lacks_network:
        return Unavailable(f"pip reaches no package index: {words}", mend="check the network and pip's configuration")
    unknown = _UNKNOWN.search(finished.output)
    if unknown:
        name = next(group for group in unknown.groups() if group).strip()
        mend = f"check its name and version; {_SOURCE}: {_MEND}"
        return Invalid(f"build.pip: there is no package for {name!r}", field="build.pip", mend=mend)
    if "No space left on device" in finished.output:
        return ImageError("the disk is full", mend="free some space")
    return ImageError(f"pip failed with status {finished.status}: {words}", field="build.pip")
