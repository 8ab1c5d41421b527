"""Makes and removes what an instance in a virtual machine consists of beside its processes. Blocking: call it from threads.

DIRECTORY/plan.json      all that its start needs, for this agent or the next (0600: it holds the environment)
          pid exit shim.lock shim.log vmm.log
          jail/          empty; the monitor's root is put together there, in its own mounts
          vm/            the monitor's own: disk.img, its sockets
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll.model.errors import Conflict, RuntimeFailed
from atoll.model.ports.devices import DeviceNode
from atoll.model.ports.runtime import Box, Limits
from atoll.runtimes.box_record import BoxRecord, BoxRecords, boot_id
from atoll.runtimes.cgroup import Cgroups, Group
from atoll.runtimes.idmap import IdMaps
from atoll.runtimes.loop_disk import DISK_BYTES_MIN, Template, copy_written
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.oci import process as oci_process
from atoll.runtimes.oci_box import HOSTS, OciBoxes, check_box, explain, write_private
from atoll.runtimes.oci_devices import environment
from atoll.runtimes.rootfs import remove_root
from atoll.runtimes.scratch import ScratchPool
from atoll.runtimes.shim import ShimFiles
from atoll.runtimes.snapshots import SNAPSHOT_DISK
from atoll.runtimes.users import User, resolve_user
from atoll.runtimes.vm.config import GuestConfig, process_words, write_config
from atoll.runtimes.vm.image import FILE, ImageDisks
from atoll.runtimes.vm.tap import GuestLink, connect
from atoll.runtimes.vm.volumes import VmVolume, volumes_of

PLAN = "plan.json"
DISK = "disk.img"
KERNEL_RESERVE_BYTES = 64 << 20
"""What a guest's kernel takes for itself: a machine gets as much more than its instance's limit, which the guest enforces."""
SLOT_MIN = 65_536
"""Slots of machines begin here, those of containers end below: a machine needs one id, not a range of them."""
_UID_MIN = 0x7FFF0000
"""The ids after the last range of a container's."""
START_CPU_MILLI_MIN = 2000
"""A boot is not charged to a small instance, which would take many times as long."""
_TEMPLATES_MAX = 8


class VmPlan(Struct, frozen=True, kw_only=True):
    """What is decided about an instance and its machine."""

    id: str
    directory: str
    uid: int
    vcpus: int
    ram_bytes: int
    limits: Limits
    disk_bytes: int
    image: str
    """The directory of its image's disk."""
    netns: str | None = None
    link: GuestLink | None = None
    stdout: str
    stderr: str
    hostname: str
    resolv_conf: str = ""
    read_only_root: bool = False
    process: dict[str, Any]
    """As in an OCI configuration."""
    pci: tuple[str, ...] = ()
    pci_window_bytes: int = 0
    nodes: tuple[DeviceNode, ...] = ()
    snapshot: str = ""
    """The directory of the snapshot that it goes on from; empty for a machine that boots."""
    image_digest: str = ""
    volumes: tuple[VmVolume, ...] = ()

    @property
    def disk(self) -> Path:
        return Path(self.directory) / "vm" / DISK

    @property
    def image_disk(self) -> Path:
        return Path(self.image) / FILE


_plans = msgspec.json.Decoder(VmPlan)


def machine_uid(slot: int) -> int:
    """Return the user that the monitor in a slot is; nobody else is it."""
    return _UID_MIN + slot - SLOT_MIN


def load_plan(directory: Path) -> VmPlan:
    """Return the plan that `make` wrote. Raises RuntimeFailed."""
    try:
        return _plans.decode((directory / PLAN).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise RuntimeFailed(f"the plan of the instance cannot be read: {error}", mend="delete the instance") from None


class VmBoxes(OciBoxes):
    """All boxes of one kind of machine. `overhead_bytes` is the monitor's own memory, `monitor_pids` its threads."""

    def __init__(
        self,
        directory: Path,
        *,
        cgroup: str,
        cgroups: Cgroups,
        slots: range,
        overhead_bytes: Callable[[], int],
        monitor_pids: int,
    ) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.records = BoxRecords(directory / "boxes")
        self.scratch = ScratchPool(directory / "scratch")
        self.idmaps = IdMaps(slots)
        self.boot_id = boot_id()
        self.userns = False
        self.images = ImageDisks(directory / "images")
        self._cgroup = cgroup.rstrip("/")
        self.cgroups = cgroups
        self._overhead_bytes = overhead_bytes
        self._monitor_pids = monitor_pids
        self._templates: dict[int, Template] = {}
        for path in (directory, self.state, directory / "scratch"):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def make(self, box: Box, *, snapshot: Path | None = None) -> BoxRecord:
        """As for containers; from `snapshot`, it has that one's disk and goes on from there when it is started."""
        check_box(box)
        if self.records.exists(box.id):
            raise Conflict(f"instance {box.id} exists already", mend="delete it first")
        slot = self.idmaps.take()
        record = BoxRecord(id=box.id, path=str(box.directory), boot_id=self.boot_id, slot=slot, disk="", limits=box.limits)
        try:
            self.records.write(record)
            (self.state / box.id).mkdir(exist_ok=True)
            self._plan(box, machine_uid(slot), snapshot)
        except BaseException as error:
            self.remove(record)
            if isinstance(error, OSError):
                raise explain(error) from None
            raise
        return record

    def _plan(self, box: Box, uid: int, snapshot: Path | None) -> None:
        box.directory.mkdir(parents=True, mode=0o700)
        image = self.images.ensure(box.image)
        user = user_of(image, box.user)
        plan = VmPlan(
            id=box.id,
            directory=str(box.directory),
            uid=uid,
            vcpus=max(1, -(-box.limits.cpu_milli // 1000)),
            ram_bytes=-(-(box.limits.memory_bytes + KERNEL_RESERVE_BYTES) >> 20) << 20,
            limits=box.limits,
            disk_bytes=max(DISK_BYTES_MIN, -(-box.limits.disk_bytes // 4096) * 4096),
            image=str(image),
            netns=str(box.netns) if box.netns else None,
            link=connect(box.netns) if box.netns else None,
            stdout=str(box.stdout),
            stderr=str(box.stderr),
            hostname=box.hostname,
            resolv_conf=box.resolv_conf.read_text() if box.resolv_conf else "",
            read_only_root=box.read_only_root,
            process=oci_process(box.argv, environment(box.env, box.devices), box.workdir or "/", user),
            pci=box.devices.pci,
            pci_window_bytes=box.devices.pci_window_bytes,
            nodes=box.devices.nodes,
            snapshot=str(snapshot) if snapshot else "",
            image_digest=box.image.digest,
            volumes=volumes_of(box.mounts),
        )
        write_private(box.directory / PLAN, msgspec.json.encode(plan))
        (box.directory / "jail").mkdir(mode=0o700)
        self._make_own(plan)

    def _make_own(self, plan: VmPlan) -> None:
        """Make the monitor's directory, with an empty disk and the guest's configuration."""
        own = Path(plan.directory) / "vm"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700)
        if plan.snapshot:
            copy_written(Path(plan.snapshot) / SNAPSHOT_DISK, plan.disk)
            for path in (own, plan.disk):
                os.chown(path, plan.uid, plan.uid)
            return
        self._template(plan.disk_bytes).copy(plan.disk)
        config = GuestConfig(
            hostname=plan.hostname,
            hosts=HOSTS.format(hostname=plan.hostname),
            resolv_conf=plan.resolv_conf,
            address=plan.link.address if plan.link else "",
            ipv6=plan.link.ipv6 if plan.link else "",
            outward=plan.link.outward if plan.link else False,
            mtu=plan.link.mtu if plan.link else 0,
            read_only_root=plan.read_only_root,
            volumes=plan.volumes,
            pids=plan.limits.pids,
            memory_bytes=plan.limits.memory_bytes,
            entropy=os.urandom(64),
            process=process_words(plan.process, make_directory=True),
        )
        write_config(plan.disk, plan.disk_bytes, config)
        for path in (own, plan.disk):
            os.chown(path, plan.uid, plan.uid)

    def _template(self, size_bytes: int) -> Template:
        template = self._templates.pop(size_bytes, None) or Template(size_bytes, self.directory / "scratch")
        while len(self._templates) >= _TEMPLATES_MAX:
            del self._templates[next(iter(self._templates))]
        self._templates[size_bytes] = template
        return template

    def limits_of(self, limits: Limits, *, booting: bool) -> Limits:
        """Return the limits of the monitor's control group for an instance's: the guest enforces memory and processes itself."""
        return Limits(
            cpu_milli=max(limits.cpu_milli, START_CPU_MILLI_MIN) if booting else limits.cpu_milli,
            memory_bytes=limits.memory_bytes + KERNEL_RESERVE_BYTES + self._overhead_bytes(),
            disk_bytes=limits.disk_bytes,
            pids=self._monitor_pids,
        )

    def open_group(self, id: str, limits: Limits) -> Group:
        """Return the monitor's control group, made with the limits of a start. Raises RuntimeFailed."""
        group = self.group(id)
        try:
            group.make(self.limits_of(limits, booting=True))
        except OSError as error:
            raise RuntimeFailed(f"cannot make the control group: {error}") from None
        return group

    def clean(self, record: BoxRecord) -> None:
        group = self.group(record.id)
        group.kill()
        group.remove()
        ShimFiles(record.directory).clear()
        if (record.directory / PLAN).exists():
            self._make_own(load_plan(record.directory))

    def remove(self, record: BoxRecord) -> None:
        group = self.group(record.id)
        group.kill()
        group.remove()
        remove_root(record.directory)
        self._forget(record.id)
        self.records.remove(record.id)
        if record.slot is not None:
            self.idmaps.give_back(record.slot)

    def recover(self, records: Sequence[BoxRecord]) -> None:
        self.idmaps.adopt(record.slot for record in records if record.slot is not None)
        used = set()
        for record in records:
            with contextlib.suppress(RuntimeFailed):
                used.add(Path(load_plan(record.directory).image))
        self.images.collect(used)
        for path in (self.directory / "scratch").iterdir():
            path.unlink()
        self.remove_strays({record.id for record in records})

    def remove_strays(self, known: set[str]) -> None:
        """End machines that no record speaks of, which is what a damaged record leaves behind."""
        for id in {path.name for path in self.state.iterdir()} - known:
            group = self.group(id)
            group.kill()
            group.remove()
            self._forget(id)

    def tidy(self) -> bool:
        return False

    def close(self) -> None:
        self.idmaps.close()
        for path in self.cgroups.group(self._cgroup).directories:
            with contextlib.suppress(OSError):  # not empty: instances live on
                path.rmdir()


def user_of(image: Path, user: str) -> User:
    """Return who `user` is in the image whose disk is in the directory `image`. Raises ImageError."""
    with descriptor(os.open(image, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        return resolve_user(fd, user)
