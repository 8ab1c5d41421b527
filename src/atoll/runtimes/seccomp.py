"""Docker's default seccomp profile in the form of an OCI configuration.

The profile is moby's own file (`data/`); its conditions on architecture, capability and kernel are resolved here, by the
rules of moby's `profiles/seccomp`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from atoll.model.errors import Unsupported

_MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
_PROBE_S_MAX = 2.0
_DEAD_ARCHITECTURES = frozenset({"SCMP_ARCH_X32"})
"""Without a rule its calls are refused by the kernel's seccomp, which is stricter; each costs 5 ms per start to compile."""

# A program of 32-bit x86 that calls exit(0): whether the kernel runs it says whether it has that architecture's calls.
_ELF_I386 = bytes.fromhex(
    "7f454c460101010000000000000000000200030001000000548004083400000000000000000000003400200001000000"
    "00000000"
    "010000000000000000800408008004086000000060000000050000000010000031c04031dbcd809090909090"
)


def profile(capabilities: frozenset[str], *, machine: str | None = None, kernel: str | None = None) -> dict[str, Any]:
    """Return `linux.seccomp` for a process with `capabilities` on this machine. Raises Unsupported for an unknown one."""
    return _profile(capabilities, machine or platform.machine(), kernel or platform.release())


@functools.lru_cache(maxsize=16)
def _profile(capabilities: frozenset[str], machine: str, kernel: str) -> dict[str, Any]:
    if machine not in _MACHINES:
        raise Unsupported(f"no seccomp profile for {machine}", mend="run Atoll on x86-64 or arm64")
    architecture, native = _MACHINES[machine]
    source = json.loads(resources.files("atoll.runtimes").joinpath("data/moby-seccomp-default.json").read_text())
    syscalls = [_rule(rule) for rule in source["syscalls"] if _applies(rule, architecture, capabilities, _version(kernel))]
    return {
        "defaultAction": source["defaultAction"],
        "defaultErrnoRet": source["defaultErrnoRet"],
        "architectures": [native, *_other_architectures(source, native)],
        "syscalls": syscalls,
    }


def _applies(rule: dict[str, Any], architecture: str, capabilities: frozenset[str], kernel: tuple[int, int]) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    if not capabilities.issuperset(includes.get("caps") or ()):
        return False
    if capabilities.intersection(excludes.get("caps") or ()):
        return False
    if includes.get("minKernel") and kernel < _version(includes["minKernel"]):
        return False
    return not (excludes.get("minKernel") and kernel >= _version(excludes["minKernel"]))


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"names": rule["names"], "action": rule["action"]}
    if rule.get("args"):
        out["args"] = rule["args"]
    if rule.get("errnoRet") is not None:
        out["errnoRet"] = rule["errnoRet"]
    return out


def _version(kernel: str) -> tuple[int, int]:
    major, _, rest = kernel.partition(".")
    minor = rest.split(".")[0].split("-")[0]
    return int(major), int(minor) if minor.isdecimal() else 0


def _other_architectures(source: dict[str, Any], native: str) -> list[str]:
    """Return those whose programs this kernel runs too; each one that is listed for nothing slows every start."""
    for entry in source["archMap"]:
        if entry["architecture"] == native:
            others = [name for name in entry["subArchitectures"] or () if name not in _DEAD_ARCHITECTURES]
            return [name for name in others if name != "SCMP_ARCH_X86" or runs_i386()]
    return []


@functools.cache
def runs_i386() -> bool:
    """Return whether this kernel runs 32-bit x86 programs, found by running one; True where that cannot be told."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "probe"
        path.write_bytes(_ELF_I386)
        path.chmod(0o700)
        try:
            return subprocess.run([path], timeout=_PROBE_S_MAX, check=False).returncode == 0
        except OSError as error:
            return error.errno != 8  # ENOEXEC
        except subprocess.TimeoutExpired:
            return True


def capabilities_here() -> int:
    """Return this process's effective capabilities as the kernel's bit mask."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
