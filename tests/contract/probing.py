"""What `probe.c` found out from inside an instance, and what it may find: for every runtime that runs programs."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("probe.c")
PROBE = ("/bin/probe",)
INSIDE = (("GREETING", "hello"), ("ATOLL_INSTANCE", "probe"))
"""The probe runs nowhere else."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOBODY_MAY = _words(
    "mount mount-cgroup remount-proc-sys umount pivot_root open_tree fsopen swapon reboot init_module finit_module delete_module "
    "kexec_load clock_settime acct iopl ioperm unshare-mount setns mknod-disk mknod-memory setpriority"
)
NOT_OF_THE_NODE_S_KERNEL = _words(
    "add_key keyctl request_key bpf perf_event_open userfaultfd io_uring_setup open_by_handle_at unshare-user unshare-cgroup "
    "vsock syslog quotactl"
)
"""An instance with a kernel of its own may ask that one for what it likes."""
DEVICES = frozenset({"1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2"})
"""null, zero, full, random, urandom, tty, ptmx."""
MOUNTS = {
    "/proc": ("proc", {"nosuid", "nodev", "noexec"}),
    "/sys": ("sysfs", {"nosuid", "nodev", "noexec", "ro"}),
    "/dev/pts": ("devpts", {"nosuid", "noexec"}),
    "/dev/shm": ("tmpfs", {"nosuid", "nodev", "noexec"}),
    "/": ("", {"nosuid", "nodev"}),
}
"""Kind and options that a mount must have, as the OCI runtime specification and Docker have them, or stricter."""

Findings = dict[str, list[str]]


def build_probe(directory: Path) -> Path:
    """Return the probe, built. Skips where there is no compiler."""
    program = directory / "probe"
    try:
        subprocess.run(["gcc", "-O1", "-static", "-o", program, SOURCE], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the probe cannot be built: {error}")
    return program


def read_findings(text: str) -> Findings:
    found: Findings = defaultdict(list)
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        found[name].append(value)
    assert "end" in found, text[-500:]
    return found


def check_findings(found: Findings, *, kernel: str, hostname: str, user: tuple[int, int, tuple[int, ...]] = (0, 0, ())) -> None:
    """Raises AssertionError with all that is wrong. `kernel` is `node`, `guest` (a machine's) or `gvisor`."""
    wrong = [f"{name}: allowed" for name in NOBODY_MAY if found[name] == ["done"] and (kernel, name) not in _OWN]
    if kernel == "node":
        wrong += [f"{name}: allowed" for name in NOT_OF_THE_NODE_S_KERNEL if found[name] == ["done"]]
        wrong += _shared_namespaces(found)
    wrong += [f"not tried: {name}" for name in (*NOBODY_MAY, *NOT_OF_THE_NODE_S_KERNEL) if not found[name]]
    if kernel != "gvisor":
        wrong += [f"masked path can be read: {entry}" for entry in found["masked"] if not entry.endswith((" 0", " -1"))]
        wrong += [f"can be written: {path}" for path in found["writable"]]
        wrong += _wrong_mounts(found)
    own = {"10:200", "10:229"} if kernel == "gvisor" else set()  # a tun and a fuse of gVisor's
    devices = [entry for entry in found["device"] if entry.rpartition(" ")[2] not in DEVICES | own]
    wrong += [f"device: {entry}" for entry in devices]
    group = sorted(int(entry) for entry in found["group"] if int(entry) != user[1])
    expected = {
        "block-devices": ["0"],
        "strangers": ["0"],
        "hostname": [hostname],
        "uid": [str(user[0])],
        "gid": [str(user[1])],
        "umask": ["22"],
        "core": ["0"],
        "no-new-privileges": ["1"],
        "descriptor": [],
        "directory": ["/"],
    }
    if kernel != "gvisor":
        expected |= {"control-group-files-written": ["0"], "proc-sys-files-written": ["0"]}
    wrong += [f"{name}: {found[name]}, not {value}" for name, value in expected.items() if found[name] != value]
    wrong += [] if group == sorted(user[2]) else [f"groups: {group}"]
    wrong += [] if int(found["files-soft"][0]) <= 1024 else ["more than 1,024 open files"]
    if wrong:
        raise AssertionError("\n".join(wrong))


_OWN = {("gvisor", "unshare-mount"), ("gvisor", "setpriority")}
"""What a kernel of the instance's own does to itself alone."""


def _shared_namespaces(found: Findings) -> list[str]:
    kinds = ("pid", "ipc", "uts", "mnt", "net", "user", "cgroup")
    return [
        f"shares the node's {kind} namespace"
        for kind in kinds
        if found[f"namespace-{kind}"] == [str(Path(f"/proc/self/ns/{kind}").readlink())]
    ]


def _wrong_mounts(found: Findings) -> list[str]:
    wrong = []
    seen = {place: (kind, set(options.split(","))) for place, kind, options in (entry.split(" ") for entry in found["mount-at"])}
    for place, (kind, options) in MOUNTS.items():
        if place not in seen:
            wrong.append(f"no mount at {place}")
        elif (kind and seen[place][0] != kind) or options - seen[place][1]:
            wrong.append(f"mount at {place}: {seen[place]}, not {kind} with {options}")
    return wrong
