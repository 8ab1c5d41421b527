"""Volumes in virtual machines: virtio-fs, one server (`virtiofsd`) per volume, started before the monitor and ended by its end.

A server is root, for a volume's files have many owners, and no more than that: it sees the volume alone, in namespaces of its own,
without network, under its seccomp filter, without the capabilities that make devices or privileged programs. It is in the monitor's
control group, and so is ended and counted with it. What is read-only is so on the node, whatever the guest's kernel does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from atoll.model.errors import Invalid, RuntimeFailed, Unsupported
from atoll.model.ports.runtime import Mount
from atoll.runtimes.mounts import descriptor

SERVER = Path("/usr/lib/qemu/virtiofsd")
"""Debian 12's, which comes with QEMU."""
MEND = "apt-get install qemu-system-x86, which has /usr/lib/qemu/virtiofsd; or use runc, crun, lxc or gvisor"
VOLUMES_MAX = 16
"""Each is a device and a process."""
THREADS = 4
LOG_BYTES_MAX = 64 << 10
START_S_MAX = 10.0
_KERNEL_S_OWN = ("/dev/", "/proc/", "/sys/")
_SCRIPT = f"""set -e
read_only=$1 volume=$2 log=$3 server=$4 fd=$5
shift 5
for group in "$@"; do echo $$ > "$group/cgroup.procs"; done
mount --bind -- "$volume" "$volume"
mount -o "remount,bind,nosuid,nodev,$read_only" -- "$volume"
trap '' PIPE
{{ "$server" --fd="$fd" --thread-pool-size={THREADS} -o source="$volume" -o modcaps=-mknod:-setfcap -o log_level=err 2>&1 \\
    | head -c {LOG_BYTES_MAX} > "$log"; }} < /dev/null 2> /dev/null &
"""
"""Runs in mounts of its own. The server's words are bounded: a guest has a say in them."""


class VmVolume(Struct, frozen=True, kw_only=True):
    """One volume of a machine."""

    source: str
    target: str
    read_only: bool = False
    number: int

    @property
    def tag(self) -> str:
        """By which the guest knows it."""
        return f"volume{self.number}"

    @property
    def socket(self) -> str:
        """In the monitor's own directory."""
        return f"{self.tag}.sock"


def volumes_of(mounts: Sequence[Mount]) -> tuple[VmVolume, ...]:
    """Return a machine's volumes, outer ones before those inside of them. Raises Invalid, RuntimeFailed, Unsupported. Blocking."""
    if not mounts:
        return ()
    if not SERVER.exists():
        raise Unsupported("volumes in a virtual machine need virtiofsd, which is not installed", mend=MEND, field="volumes")
    if len(mounts) > VOLUMES_MAX:
        raise Unsupported(
            f"a virtual machine takes {VOLUMES_MAX} volumes, and this has {len(mounts)}", mend="merge some", field="volumes"
        )
    ordered = sorted(mounts, key=lambda mount: Path(mount.target).parts)
    for mount in ordered:
        if not mount.source.is_dir():
            raise RuntimeFailed(f"cannot show the volume: {mount.source} is no directory", mend="is the volume still on this node?")
        _check_target(mount.target)
    return tuple(
        VmVolume(source=str(mount.source), target=mount.target, read_only=mount.read_only, number=number)
        for number, mount in enumerate(ordered)
    )


def _check_target(target: str) -> None:
    path = os.path.normpath(target)
    if not target.startswith("/") or "\0" in target or path == "/" or f"{path}/".startswith(_KERNEL_S_OWN):
        raise Invalid(
            f"a volume cannot be mounted at {target!r} in a virtual machine",
            mend="choose a directory outside of /dev, /proc and /sys",
            field="volumes",
        )


def start_server(volume: VmVolume, directory: Path, *, owner: int, groups: Sequence[Path]) -> None:
    """Serve `volume` on its socket in `directory/vm`, which the user `owner` may connect to, in the control groups `groups`.

    It ends with the one connection that it takes. Raises RuntimeFailed. Blocking.
    """
    log = directory / f"{volume.tag}.log"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with listener:
        _bind(listener, directory / "vm", volume.socket, owner)
        listener.listen(1)
        fd = listener.fileno()
        arguments = ["ro" if volume.read_only else "rw", volume.source, str(log), str(SERVER), str(fd), *map(str, groups)]
        try:
            done = subprocess.run(
                ["unshare", "--mount", "--", "/bin/sh", "-c", _SCRIPT, "sh", *arguments],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=START_S_MAX,
                check=False,
                start_new_session=True,
                cwd="/",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeFailed(f"cannot serve the volume at {volume.target}: {error}") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()[-300:]
        raise RuntimeFailed(f"cannot serve the volume at {volume.target}: {words}")


def _bind(listener: socket.socket, directory: Path, name: str, owner: int) -> None:
    """The directory is the monitor's: its path may be longer than an address can be."""
    with descriptor(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)) as place:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=place)
        listener.bind(f"/proc/self/fd/{place}/{name}")
        os.chown(name, owner, owner, dir_fd=place, follow_symlinks=False)


def volume_devices(volumes: Sequence[VmVolume], ram_bytes: int, inside: Path, *, bus: str) -> list[str]:
    """Return QEMU's arguments for `volumes`: the servers reach into the guest's memory, which so is shared with them."""
    if not volumes:
        return []
    words = ["-object", f"memory-backend-memfd,id=ram,size={ram_bytes >> 20}M,share=on", "-machine", "memory-backend=ram"]
    for volume in volumes:
        words += ["-chardev", f"socket,id={volume.tag},path={inside / volume.socket}"]
        words += ["-device", f"vhost-user-fs-{bus},chardev={volume.tag},tag={volume.tag}"]
    return words
