"""Whether this machine can run instances with an OCI runtime's tool: by looking, and by running one program with it.

Blocking: call it from threads.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from atoll.model.errors import AtollError, Unsupported
from atoll.model.ports.runtime import Limits
from atoll.runtimes.box_record import boot_id
from atoll.runtimes.cgroup import Cgroups
from atoll.runtimes.native import shim_path
from atoll.runtimes.seccomp import capabilities_here

RUN_S_MAX = 20.0
"""A tool that does not run a program to its end within it is not offered."""
_VERSION_S_MAX = 10.0
_WORDS_MAX = 300
_NEEDED_CAPABILITIES = {"CAP_CHOWN": 0, "CAP_KILL": 5, "CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_PROBE_LIMITS = Limits(cpu_milli=1000, memory_bytes=256 << 20, disk_bytes=1 << 20, pids=256)
_PROBE_MOUNTS = (("proc", "proc"), ("dev", "tmpfs"))
_PROBE_SAYS = "usage: see shim.c"
"""What the shim, which is the program that is run, says when it is given nothing to do."""


def check_machine(*programs: tuple[str, str]) -> None:
    """Check what every kind of container here needs, and that each (program, package) is installed. Raises Unsupported."""
    if os.geteuid() != 0:
        raise Unsupported("containers need root", mend="run the agent as root")
    held = capabilities_here()
    missing = [name for name, bit in _NEEDED_CAPABILITIES.items() if not held >> bit & 1]
    if missing:
        raise Unsupported(f"missing capability {', '.join(missing)}", mend="run the agent with the full capabilities of root")
    shim_path()
    for program, package in (*programs, ("mkfs.ext4", "e2fsprogs")):
        if shutil.which(program) is None:
            raise Unsupported(f"{program} is not installed", mend=f"apt-get install {package}")
    if not Path("/dev/loop-control").exists():
        raise Unsupported("no loop devices", mend="modprobe loop")
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        raise Unsupported("no overlay file system", mend="modprobe overlay")
    Cgroups.detect()


def version_of(binary: str, *, package: str, oldest: tuple[int, int]) -> str:
    """Return the version that `binary` says. Raises Unsupported where it says none, or one older than `oldest`."""
    reinstall = f"apt-get install --reinstall {package}"
    try:
        result = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=_VERSION_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"{binary} does not run: {error}", mend=reinstall) from None
    match = re.search(r"(?:version )?(?:release-)?(\d+)\.(\d+)\S*", result.stdout)
    if match is None:
        raise Unsupported(f"{binary} does not say its version", mend=reinstall)
    if (int(match[1]), int(match[2])) < oldest:
        raise Unsupported(f"{binary} {match[0]} is too old", mend=f"install {package} {oldest[0]}.{oldest[1]} or newer")
    return match[0].removeprefix("version ")


class _Seen(Struct, frozen=True):
    """What a successful probe was of: the machine since its start, and the tool's file."""

    boot_id: str
    path: str
    changed_ns: int
    version: str


def once_per_boot(directory: Path, binary: str, probe: Callable[[], str], *, file: str = "probe.json") -> str:
    """Return what `probe` returns, without running it again for the same tool on the same run of the machine.

    `directory` keeps the answer in `file` for the next agent, which is then ready sooner. Only success is kept.
    """
    path, answer = shutil.which(binary) or "", directory / file
    seen = _Seen(boot_id(), path, Path(path).stat().st_mtime_ns if path else 0, "")
    with suppress(OSError, msgspec.DecodeError):
        kept = msgspec.json.decode(answer.read_bytes(), type=_Seen)
        if structs.replace(kept, version="") == seen:
            return kept.version
    version = probe()
    with suppress(OSError):  # it is only slower then
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        answer.write_bytes(msgspec.json.encode(structs.replace(seen, version=version)))
    return version


def run_once(tool: Callable[[Path, Path], Sequence[str]], cgroup: str) -> str:
    """Run a program with a tool, and return why that failed, or nothing.

    `tool` gives the command up to its `run` for a state directory and a log file; `cgroup` is the parent of the control
    group, which is removed again, as is all else.
    """
    id = f"probe-{uuid.uuid4().hex[:12]}"
    cgroups = Cgroups.detect()
    group = cgroups.group(f"{cgroup.rstrip('/')}/{id}")
    with tempfile.TemporaryDirectory(prefix="atoll-probe-") as directory:
        bundle, log = Path(directory), Path(directory) / "log"
        for name in ("dev", "proc"):
            (bundle / "rootfs" / name).mkdir(parents=True)
        shutil.copy(shim_path(), bundle / "rootfs/probe")
        config = _configuration(f"{cgroup.rstrip('/')}/{id}", cgroups.resources(_PROBE_LIMITS))
        (bundle / "config.json").write_bytes(msgspec.json.encode(config))
        try:
            words = _run([*tool(bundle / "state", log), "run", "--bundle", directory, id], bundle / "output")
            if _PROBE_SAYS in words:
                return ""
            return f"{words} {_text(log)}".strip()[-_WORDS_MAX:]
        finally:
            with suppress(AtollError):
                group.kill()
                group.remove()
            for path in cgroups.group(cgroup).directories:
                with suppress(OSError):  # not there, or others are in it
                    path.rmdir()


def _run(command: Sequence[str], output: Path) -> str:
    """Return what the command and the program said; all of its processes are killed at the deadline."""
    with output.open("wb") as file:  # a file, because what a tool leaves running would hold a pipe open
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(RUN_S_MAX)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session, so that nobody else is meant
            process.wait()
            return f"a program did not run to its end within {RUN_S_MAX:.0f} s. {_text(output)}"
    return _text(output)


def _text(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(errors="replace").strip()
    return ""


def _configuration(cgroup: str, resources: dict[str, Any]) -> dict[str, Any]:
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/probe"],
            "env": ["PATH=/"],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [{"destination": f"/{name}", "type": kind, "source": kind} for name, kind in _PROBE_MOUNTS],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "cgroupsPath": cgroup,
            "resources": resources,
        },
    }
