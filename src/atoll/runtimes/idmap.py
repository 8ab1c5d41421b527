"""Ranges of user ids, one per instance, and the user namespaces that shift file ownership into them.

Root inside an instance is an unprivileged id outside, and no two instances share an id. Ids from 0x70000000 up are left
alone by systemd and by subuid tools.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path

from atoll.model.errors import Exhausted, RuntimeFailed
from atoll.runtimes.mounts import clone_tree, descriptor, set_attributes
from atoll.runtimes.native import shim_path

IDS_PER_INSTANCE = 65_536
BASE_ID = 0x70000000
SLOTS_MAX = 4_093
IDLE_NAMESPACES_MAX = 64
READY_NAMESPACES = 4
"""How many are made ahead, of the slots that come next."""


class IdMaps:
    """Hands out slots; a slot's ids are `base(slot)` and the 65,535 after it. Blocking, safe in threads."""

    def __init__(self, slots: range = range(SLOTS_MAX)) -> None:
        self._lock = threading.Lock()
        self._used: set[int] = set()
        self._free: list[int] = []
        self._slots = slots
        self._next = slots.start
        self._namespaces: dict[int, int] = {}

    @staticmethod
    def base(slot: int) -> int:
        return BASE_ID + slot * IDS_PER_INSTANCE

    def take(self) -> int:
        """Return a free slot, one whose namespace is ready where there is one. Raises Exhausted."""
        with self._lock:
            while self._free:
                slot = self._free.pop()
                if slot not in self._used:
                    self._used.add(slot)
                    return slot
            while self._next in self._used:
                self._next += 1
            if self._next >= self._slots.stop:
                raise Exhausted(f"all {len(self._slots)} ranges of user ids are taken", mend="run fewer instances on this node")
            self._used.add(self._next)
            return self._next

    def adopt(self, slots: Iterable[int]) -> None:
        with self._lock:
            self._used.update(slots)

    def give_back(self, slot: int) -> None:
        with self._lock:
            if slot in self._used:
                self._used.remove(slot)
                self._free.append(slot)

    def namespace(self, slot: int) -> int:
        """Return a descriptor of the slot's user namespace. It belongs to this object: do not close it."""
        with self._lock:
            if slot in self._namespaces:
                return self._namespaces[slot]
        made = make_user_namespace(self.base(slot))
        with self._lock:
            if slot in self._namespaces:
                os.close(made)
            else:
                self._forget_surplus()
                self._namespaces[slot] = made
            return self._namespaces[slot]

    def prepare(self) -> bool:
        """Make the namespace of one of the slots that are taken next; return whether there was one to make."""
        with self._lock:
            fresh = (slot for slot in range(self._next, self._slots.stop) if slot not in self._used)
            coming = [*reversed(self._free[-READY_NAMESPACES:]), *itertools.islice(fresh, READY_NAMESPACES)][:READY_NAMESPACES]
            missing = next((slot for slot in coming if slot not in self._namespaces), None)
        if missing is None:
            return False
        self.namespace(missing)
        return True

    def _forget_surplus(self) -> None:
        """Close namespaces that nobody uses, oldest first. Those in use stay: their holder may be about to mount with one."""
        idle = [slot for slot in self._namespaces if slot not in self._used]
        for slot in idle[: max(0, len(idle) - IDLE_NAMESPACES_MAX)]:
            os.close(self._namespaces.pop(slot))

    def close(self) -> None:
        with self._lock:
            while self._namespaces:
                os.close(self._namespaces.popitem()[1])


def make_user_namespace(base: int) -> int:
    """Return a descriptor of a new user namespace in which `base` is root. Raises RuntimeFailed."""
    with subprocess.Popen([shim_path(), "userns"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - asked for above
        if not process.stdout.read(1):
            raise RuntimeFailed(
                "this kernel makes no user namespaces", mend="sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone"
            )
        proc = Path(f"/proc/{process.pid}")
        for name in ("uid_map", "gid_map"):
            (proc / name).write_text(f"0 {base} {IDS_PER_INSTANCE}\n")
        return os.open(proc / "ns/user", os.O_RDONLY | os.O_CLOEXEC)


def idmaps_work(directory: Path) -> bool:
    """Return whether this kernel and the file system of `directory` can shift ids by a mount."""
    try:
        with descriptor(make_user_namespace(BASE_ID)) as namespace, descriptor(clone_tree(directory)) as tree:
            set_attributes(tree, 0, userns=namespace)
    except (OSError, RuntimeFailed):
        return False
    return True
