"""Makes and removes what an instance of an OCI runtime consists of beside its processes. Blocking: call it from threads.

Order of making: record, directory, disk, root, mounts, configuration. Removal goes the other way and is safe to repeat, so
that a crash in between leaves nothing that the next agent does not find.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll.model.errors import Conflict, Exhausted, Invalid, RuntimeFailed
from atoll.model.ports.runtime import Box
from atoll.model.spec import Resources
from atoll.runtimes.box_record import BoxRecord, BoxRecords, boot_id
from atoll.runtimes.cgroup import CPU_PERIOD_US, Cgroups, Group
from atoll.runtimes.idmap import SLOTS_MAX, IdMaps, idmaps_work
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.native import guest_path
from atoll.runtimes.oci import Bundle, configuration, launch_netns
from atoll.runtimes.oci_devices import check_sources, device_rules, make_links, show_nodes
from atoll.runtimes.oci_filter import Filter, is_reached, open_filter, sealed, write_bundle
from atoll.runtimes.rootfs import drop_mounts, make_root, place_mounts, remove_root, show_mounts
from atoll.runtimes.scratch import ScratchPool
from atoll.runtimes.shim import ShimFiles
from atoll.runtimes.snapshots import SNAPSHOT_DISK
from atoll.runtimes.sysfs import mount_sysfs
from atoll.runtimes.users import User, resolve_user

HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
START_PIDS_MIN = 32
"""The runtime's tool needs some threads inside the group before the command runs; the limit is lowered after that."""
START_CPU_QUOTA_US_MIN = CPU_PERIOD_US
"""The tool's own work inside the group is not charged to a small instance, which would wait several periods to start."""


STDOUT, STDERR, NETNS, OPTIONS = "io.atoll.stdout", "io.atoll.stderr", "io.atoll.netns", "io.atoll.options"
"""Annotations by which the next agent knows what an instance's tools are started with."""
ATTENDED = "io.atoll.attended"
"""The annotation of one in which an usher waits; it is where the usher's program is inside, or empty where that is handed in."""
_STATE_FILE = "_sandbox:"
"""What follows the id in the names of runsc's state files."""
SPARE_DISK_BYTES = int(Resources().disk)
RUNTIME_DIRECTORY = Path("/run/atoll")
"""Where roots are mounted; it must be open to all, as /run is."""


class OciBoxes:
    """All boxes of one OCI runtime on this node. `directory` is the runtime's own; `cgroup` the parent of their groups."""

    tool_makes_nodes = True
    """Whether the runtime's tool makes device files where no ids are shifted."""
    tool_compiles_filter = True
    """Whether the runtime's tool compiles the system call filter, and is better spared it."""

    usher = ""
    """Where an usher's program is shown in instances; empty where it is handed in."""

    filter: Filter | None = None
    """What puts it on in the place of the tool."""

    def __init__(
        self,
        directory: Path,
        *,
        cgroup: str,
        cgroups: Cgroups,
        userns: bool | None = None,
        slots: range = range(SLOTS_MAX),
        threads_beside: int = 0,
        own_tmp: bool = False,
        places_mounts: bool = True,
        tool_options: Callable[[Box], Sequence[str]] | None = None,
        runtime_directory: Path = RUNTIME_DIRECTORY,
    ) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.records = BoxRecords(directory / "boxes")
        self.scratch = ScratchPool(directory / "scratch")
        self.idmaps = IdMaps(slots)
        self.boot_id = boot_id()
        self._cgroup = cgroup.rstrip("/")
        self.cgroups = cgroups
        self._threads_beside = threads_beside
        self._own_tmp = own_tmp
        self._places_mounts = places_mounts
        self._tool_options = tool_options
        self._usher_program = -1
        self._unneeded: deque[Path] = deque()  # mounts of boxes that exist; `tidy` empties it soon after each `make`
        for path in (directory, self.state, directory / "scratch"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        # An instance with ids of its own must reach its root by path, and may pass through none of our directories.
        self._roots = runtime_directory / hashlib.sha256(bytes(directory.resolve())).hexdigest()[:12]
        self._roots.mkdir(parents=True, exist_ok=True)
        for path in (runtime_directory, self._roots):
            path.chmod(0o711)
        self.userns = idmaps_work(directory) if userns is None else userns
        self.filter = open_filter() if self.userns and self.tool_compiles_filter else None

    def usher_program(self) -> int:
        """Return a descriptor of the usher's program, sealed and for nobody inside to read; it is open until `close`. Blocking."""
        if self._usher_program < 0:
            self._usher_program = sealed("atoll-usher", guest_path().read_bytes(), mode=0o111)
        return self._usher_program

    def root(self, id: str) -> Path:
        """Return where the root of `id` is mounted."""
        return self._roots / id / "root"

    def group(self, id: str) -> Group:
        return self.cgroups.group(f"{self._cgroup}/{id}")

    def make(self, box: Box, *, snapshot: Path | None = None) -> BoxRecord:
        """Make all of `box`, with the disk of the snapshot in `snapshot` if there is one.

        Raises Conflict, Invalid, ImageError, RuntimeFailed or Exhausted; nothing is left then.
        """
        check_box(box)
        if self.records.exists(box.id):
            raise Conflict(f"instance {box.id} exists already", mend="delete it first")
        slot = self.idmaps.take() if self.userns else None
        disk = ""
        try:
            disk, point = self.scratch.take(box.limits.disk_bytes, snapshot / SNAPSHOT_DISK if snapshot else None)
            record = BoxRecord(id=box.id, path=str(box.directory), boot_id=self.boot_id, slot=slot, disk=disk, limits=box.limits)
            self.records.write(record)
            self._fill(box, record, point)
        except BaseException as error:
            self.remove(BoxRecord(id=box.id, path=str(box.directory), boot_id="", slot=slot, disk=disk, limits=box.limits))
            if isinstance(error, OSError):
                raise explain(error) from None
            raise
        return record

    def _fill(self, box: Box, record: BoxRecord, disk: Path) -> None:
        directory = box.directory
        directory.mkdir(parents=True, mode=0o700)
        base_id = None if record.slot is None else self.idmaps.base(record.slot)
        userns = None if record.slot is None else self.idmaps.namespace(record.slot)
        root = self.root(box.id)
        # Only the instance may pass: to others on the node its files are none of their business.
        root.parent.mkdir(mode=0o710)
        os.chown(root.parent, 0, base_id or 0)
        self._unneeded.extend(make_root(root, directory, box.image.layers, disk, base_id=base_id or 0, userns=userns))
        user = user_in(root, box.user)
        check_sources(box.devices)
        make_links(root, box.devices.links, base_id=base_id or 0)
        sysfs = None
        shown = self._shown(box)
        if base_id is not None and box.netns is not None:
            sysfs = shown / "sysfs"
            sysfs.mkdir()
            mount_sysfs(box.netns, sysfs)
        hosts, hostname = shown / "hosts", shown / "hostname"
        write_private(hosts, HOSTS.format(hostname=box.hostname).encode(), 0o644)
        write_private(hostname, f"{box.hostname}\n".encode(), 0o644)
        for fifo in (box.stdout, box.stderr):
            # So that the process can open /dev/stdout by name, whoever it is.
            os.chown(fifo, (base_id or 0) + user.uid, (base_id or 0) + user.gid)
        resources = self.cgroups.resources(box.limits)
        resources["pids"]["limit"] = max(START_PIDS_MIN, box.limits.pids + self._threads_beside)
        resources["cpu"]["quota"] = max(START_CPU_QUOTA_US_MIN, resources["cpu"]["quota"])
        resources["devices"] += device_rules(box.devices)
        bundle = Bundle(
            root=root,
            user=user,
            base_id=base_id,
            cgroup=f"{self._cgroup}/{box.id}",
            resources=resources,
            volumes=tuple(show_mounts(shown, box.mounts, userns=userns)),
            nodes=self._show_nodes(box, base_id),
            hosts=hosts,
            hostname_file=hostname,
            sysfs=sysfs,
            usher=guest_path() if box.attended and self.usher else None,
        )
        config = configuration(box, bundle)
        if self._own_tmp and (root / "tmp").is_dir() and not (root / "tmp").is_symlink():
            keep = {"destination": "/tmp", "type": "bind", "source": str(root / "tmp"), "options": ["rbind", "nosuid", "nodev"]}  # noqa: S108
            config["mounts"].insert(0, keep)
        if self._places_mounts:
            config["mounts"] = place_mounts(root, config["mounts"], owner=base_id or 0)
        config["annotations"] = {STDOUT: str(box.stdout), STDERR: str(box.stderr), NETNS: launch_netns(box, bundle)}
        if self._tool_options is not None and (options := self._tool_options(box)):
            config["annotations"][OPTIONS] = " ".join(options)
        if box.attended:
            config["annotations"][ATTENDED] = self.usher
        self._write(box, bundle, config)

    def _shown(self, box: Box) -> Path:
        """Return the directory from which the tool mounts what the instance sees beside its root."""
        return box.directory

    def _show_nodes(self, box: Box, base_id: int | None) -> tuple[Path, ...] | None:
        if base_id is None and self.tool_makes_nodes:
            return None
        return show_nodes(box.directory, box.devices.nodes, base_id=base_id or 0)

    def _write(self, box: Box, bundle: Bundle, config: dict[str, Any]) -> None:
        """Write the configuration, and what the tool is configured by; root and mounts are made."""
        write_private(box.directory / "config.json", msgspec.json.encode(config))
        volumes = [entry.target for entry in box.mounts]
        if self.filter is not None and is_reached(bundle.root, config["mounts"], volumes):
            write_bundle(box.directory, self.filter.bundle(config))

    def tidy(self) -> bool:
        """Do one piece of the work that `make` put off or will want done; return whether there may be more."""
        if self._unneeded:
            drop_mounts([self._unneeded.popleft() for _ in range(len(self._unneeded))])
            return True
        if self.userns and self.idmaps.prepare():
            return True
        return self.scratch.refill()

    def clean(self, record: BoxRecord) -> None:
        """End what is left of an attempt to run the box, so that it is as `make` left it."""
        group = self.group(record.id)
        group.kill()
        group.remove()
        self._forget(record.id)
        ShimFiles(record.directory).clear()

    def remove(self, record: BoxRecord) -> None:
        """Kill what runs and remove every trace; safe to repeat. Raises RuntimeFailed; then call it again."""
        self.clean(record)
        remove_root(self._roots / record.id)
        remove_root(record.directory)
        if record.disk:
            self.scratch.release(record.disk)
        self.records.remove(record.id)
        if record.slot is not None:
            self.idmaps.give_back(record.slot)

    def recover(self, records: Sequence[BoxRecord]) -> None:
        """Keep what `records` use, and remove all else that an earlier agent left."""
        self.idmaps.adopt(record.slot for record in records if record.slot is not None)
        self.remove_strays({record.id for record in records})
        self.scratch.recover(record.disk for record in records)
        self.scratch.want(SPARE_DISK_BYTES)

    def remove_strays(self, known: set[str]) -> None:
        """Remove what no record speaks of, which is what a damaged record leaves behind.

        Only our own directories are searched: other runtimes and agents have groups beside ours.
        """
        named = {path.name.partition(_STATE_FILE)[0] for directory in (self.state, self._roots) for path in directory.iterdir()}
        for id in named - known:
            group = self.group(id)
            group.kill()
            group.remove()
            remove_root(self._roots / id)
            self._forget(id)

    def _forget(self, id: str) -> None:
        """Remove what the tool noted down of an instance: a directory, or (runsc) files."""
        shutil.rmtree(self.state / id, ignore_errors=True)
        for path in self.state.glob(f"{id}{_STATE_FILE}*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.scratch.close()
        self.idmaps.close()
        if self.filter is not None:
            self.filter.close()
        if self._usher_program >= 0:
            os.close(self._usher_program)
            self._usher_program = -1
        for path in (self._roots, *self.cgroups.group(self._cgroup).directories):
            with contextlib.suppress(OSError):  # not empty: instances live on
                path.rmdir()


class SavedConfig(Struct, frozen=True):
    """The parts of a saved configuration that later calls need."""

    process: dict[str, Any]
    root: dict[str, Any]
    annotations: dict[str, str]


_saved = msgspec.json.Decoder(SavedConfig)


def load_config(directory: Path) -> SavedConfig:
    """Return the configuration that `make` wrote. Raises RuntimeFailed."""
    try:
        return _saved.decode((directory / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise RuntimeFailed(f"the configuration of the instance cannot be read: {error}", mend="delete the instance") from None


def user_in(root: Path, user: str) -> User:
    """Return who `user` is in the root directory `root`. Raises ImageError."""
    with descriptor(open_root(root)) as fd:
        return resolve_user(fd, user)


def open_root(root: Path) -> int:
    """Return a descriptor of a root directory, for `open_beneath`; the caller closes it."""
    return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def check_box(box: Box) -> None:
    """Raises Invalid for what no runtime can start."""
    if not box.argv or not box.argv[0]:
        raise Invalid("no command to run", mend="give a command, or an image with an entry point", field="command")
    texts = [*box.argv, box.workdir, box.hostname, *(part for pair in box.env for part in pair)]
    if any("\0" in text for text in texts):
        raise Invalid("a NUL character in the command or the environment", field="command")
    if box.workdir and not box.workdir.startswith("/"):
        raise Invalid(f"the working directory {box.workdir!r} is not absolute", field="workdir")


def explain(error: OSError) -> Exhausted | RuntimeFailed:
    """Return what the failure to make an instance is for its user."""
    if error.errno in {28, 122}:  # ENOSPC, EDQUOT
        return Exhausted("the node's disk is full", mend="free space on the node")
    return RuntimeFailed(f"cannot make the instance: {error}")


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that only root reads: it may hold secrets."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
