"""The OCI runtime configuration (`config.json`) of an instance, with the isolation that Docker gives and more.

Specification: opencontainers/runtime-spec. Every OCI runtime here is configured by this file.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from atoll.model.ports.runtime import Box
from atoll.runtimes.idmap import IDS_PER_INSTANCE
from atoll.runtimes.oci_devices import device_entries, environment
from atoll.runtimes.seccomp import capabilities_here, profile
from atoll.runtimes.users import User

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Docker's default set."""

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

USHER = "/run/.atoll-usher"
"""Where an usher's program is shown where no descriptor of it can be handed in."""
SHM_BYTES = 64 << 20
OPEN_FILES_SOFT = 1024
OPEN_FILES_HARD = 524_288
"""As systemd gives its services: programs that need more than 1,024 raise it themselves."""

_CAP_SYS_RESOURCE = 24
_PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Bundle(Struct, frozen=True, kw_only=True):
    """What is decided about an instance beside its Box."""

    root: Path
    user: User
    base_id: int | None
    """The id on the node of the instance's root; None without a user namespace."""
    cgroup: str
    resources: dict[str, Any]
    volumes: tuple[Path, ...] = ()
    """Where each of the box's mounts is shown, in their order."""
    nodes: tuple[Path, ...] | None = None
    """Where each of the box's device files is shown, in their order; None where the tool makes them."""
    hosts: Path | None = None
    hostname_file: Path | None = None
    sysfs: Path | None = None
    """A mount of sysfs for the instance's network namespace; None to let the runtime make its own."""
    usher: Path | None = None
    """The program that is shown at USHER, if any is."""


def configuration(box: Box, bundle: Bundle) -> dict[str, Any]:
    """Return `config.json` for `box`. It holds the environment, secrets included: write it for root only."""
    linux: dict[str, Any] = {
        "namespaces": _namespaces(box, bundle),
        "cgroupsPath": bundle.cgroup,
        "resources": bundle.resources,
        "seccomp": profile(frozenset(CAPABILITIES)),
        "maskedPaths": [*MASKED_PATHS, *box.devices.masked],
        "readonlyPaths": list(READ_ONLY_PATHS),
        "rootfsPropagation": "private",
    }
    if box.devices.nodes and bundle.nodes is None:
        linux["devices"] = device_entries(box.devices)
    if bundle.base_id is not None:
        ids = [{"containerID": 0, "hostID": bundle.base_id, "size": IDS_PER_INSTANCE}]
        linux["uidMappings"] = linux["gidMappings"] = ids
    return {
        "ociVersion": "1.0.2",
        "process": process(box.argv, environment(box.env, box.devices), box.workdir or "/", bundle.user),
        "root": {"path": str(bundle.root), "readonly": box.read_only_root},
        "hostname": box.hostname,
        "mounts": _mounts(box, bundle),
        "linux": linux,
    }


def launch_netns(box: Box, bundle: Bundle) -> str:
    """Return the network namespace that the runtime's tool must be started in, or `-`.

    A network namespace that the node made belongs to the node's user namespace. runc before 1.2 enters an instance's user
    namespace first, and may then not enter the other: so it starts there, and the instance inherits it.
    """
    return str(box.netns) if box.netns is not None and bundle.base_id is not None else "-"


def process(argv: Sequence[str], env: Sequence[tuple[str, str]], workdir: str, user: User, *, tty: bool = False) -> dict[str, Any]:
    """Return the `process` of a configuration; `runc exec --process` takes it too."""
    variables = dict(env)
    variables.setdefault("PATH", _PATH_DEFAULT)
    variables.setdefault("HOME", user.home)
    if tty:
        variables.setdefault("TERM", "xterm")
    who: dict[str, Any] = {"uid": user.uid, "gid": user.gid}
    if user.groups:
        who["additionalGids"] = list(user.groups)
    return {
        "terminal": tty,
        "user": who,
        "args": list(argv),
        "env": [f"{name}={value}" for name, value in variables.items()],
        "cwd": workdir,
        "capabilities": _capabilities(user),
        "rlimits": rlimits(),
        "noNewPrivileges": True,
    }


def _capabilities(user: User) -> dict[str, list[str]]:
    """Root has Docker's set; another user has it as a bound only, and with no_new_privs can never gain it."""
    held = list(CAPABILITIES) if user.uid == 0 else []
    return {"bounding": list(CAPABILITIES), "permitted": held, "effective": held}


def rlimits() -> list[dict[str, Any]]:
    """Return the resource limits, cut to what this process may give: a hard limit is raised by CAP_SYS_RESOURCE alone."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = OPEN_FILES_HARD
    if hard != resource.RLIM_INFINITY and not capabilities_here() >> _CAP_SYS_RESOURCE & 1:
        most = min(most, hard)
    return [
        {"type": "RLIMIT_NOFILE", "soft": min(OPEN_FILES_SOFT, most), "hard": most},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]


def _namespaces(box: Box, bundle: Bundle) -> list[dict[str, str]]:
    kinds: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    if box.netns is None:
        kinds.append({"type": "network"})
    elif bundle.base_id is None:
        kinds.append({"type": "network", "path": str(box.netns)})
    # With both, the runtime's tool is started in the network namespace: see `launch_netns`.
    if bundle.base_id is not None:
        kinds.append({"type": "user"})
    return kinds


def _mounts(box: Box, bundle: Bundle) -> list[dict[str, Any]]:
    mounts = [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", f"size={SHM_BYTES}"),  # noqa: S108
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]
    if bundle.sysfs is None:
        mounts.append(_mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"))
    else:
        mounts.append(_mount("/sys", "bind", str(bundle.sysfs), "rbind", "nosuid", "noexec", "nodev", "ro"))
    mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"))
    for path, source in (
        ("/etc/resolv.conf", box.resolv_conf),
        ("/etc/hosts", bundle.hosts),
        ("/etc/hostname", bundle.hostname_file),
    ):
        if source is not None:
            mounts.append(_mount(path, "bind", str(source), "bind", "nosuid", "noexec", "nodev", "ro"))
    if bundle.usher is not None:
        mounts.append(_mount(USHER, "bind", str(bundle.usher), "bind", "nosuid", "nodev", "ro"))
    for file in box.devices.mounts:
        mounts.append(_mount(file.target, "bind", file.source, *file.options))
    if bundle.nodes is not None:
        for node, made in zip(box.devices.nodes, bundle.nodes, strict=True):
            mounts.append(_mount(node.path, "bind", str(made), "bind", "nosuid", "noexec", "rw"))
    for entry, shown in zip(box.mounts, bundle.volumes, strict=True):
        mounts.append(_mount(entry.target, "bind", str(shown), "rbind", "nosuid", "nodev", "ro" if entry.read_only else "rw"))
    return mounts


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}
