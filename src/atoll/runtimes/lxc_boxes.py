"""What an instance of LXC consists of beside its processes: what every OCI instance does, and LXC's own configuration."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path
from typing import Any

from atoll.model.ports.runtime import Box
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.cgroup import Group
from atoll.runtimes.inside import process_file
from atoll.runtimes.lxc_config import MONITOR, configuration_lines
from atoll.runtimes.mount_points import make_point
from atoll.runtimes.mounts import bind, descriptor
from atoll.runtimes.oci import CAPABILITIES, Bundle
from atoll.runtimes.oci_box import NETNS, OciBoxes, open_root, write_private
from atoll.runtimes.seccomp_program import filter_program

CONFIG, PROCESS = "lxc.conf", "process"
"""In the box's directory: LXC's configuration, and the process that the shim becomes inside."""
DEVICES = "devices"
PIVOT = "/lxc.pivot"
"""The control group in which LXC's process ends where a start fails, and which it leaves."""
LOCKS = Path("/run/lxc/lock")
"""Where LXC leaves a lock of each container that it ever started."""


class LxcBoxes(OciBoxes):
    """All boxes of LXC on this node."""

    tool_makes_nodes = False
    tool_compiles_filter = False

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        self._locks = LOCKS / str(self._roots).lstrip("/")

    def _write(self, box: Box, bundle: Bundle, config: dict[str, Any]) -> None:
        config["annotations"][NETNS] = "-"  # LXC joins it itself
        self._reach(self._shown(box), config["mounts"])
        super()._write(box, bundle, config)
        owner = bundle.base_id or 0
        with descriptor(open_root(bundle.root)) as root:
            lines = configuration_lines(
                config,
                netns=box.netns,
                cgroups=self.cgroups,
                point=lambda path, directory: make_point(root, path, directory=directory, owner=owner),
            )
        write_private(box.directory / CONFIG, lines.encode(errors="surrogateescape"))
        program = filter_program(frozenset(CAPABILITIES))
        write_private(box.directory / PROCESS, process_file(config["process"], program, make_directory=True))

    def _shown(self, box: Box) -> Path:
        """LXC mounts as the instance's root user, who may pass here and through no directory of the agent's."""
        return self.root(box.id).parent

    def _show_nodes(self, box: Box, base_id: int | None) -> tuple[Path, ...]:
        made = super()._show_nodes(box, base_id) or ()
        place = box.directory / DEVICES
        if not place.exists():  # there are none, or they are the node's own
            return made
        point = self._shown(box) / DEVICES
        point.mkdir()
        place.chmod(0o711)
        bind(place, point)
        return tuple(point / path.name for path in made)

    @staticmethod
    def _reach(shown: Path, mounts: list[dict[str, Any]]) -> None:
        """Show what the instance's root user cannot reach by its path at one that he can."""
        for at, entry in enumerate(mounts):
            source = Path(entry["source"])
            if entry["type"] != "bind" or shown in source.parents or _open_to_all(source):
                continue
            point = shown / f"mount{at}"
            if source.is_dir():
                point.mkdir()
            else:
                point.touch()
            bind(source, point, recursive=True)
            entry["source"] = str(point)

    def monitor_group(self, id: str) -> Group:
        """Return the group where LXC's own process is while it starts the instance."""
        return self.cgroups.group(f"{self._cgroup}/{MONITOR}{id}")

    def remove_monitor(self, id: str) -> None:
        """Remove what LXC's process, which has ended, left of itself. Safe to repeat. Raises RuntimeFailed."""
        self.monitor_group(id).remove()
        (self._locks / f".{id}").unlink(missing_ok=True)

    def clean(self, record: BoxRecord) -> None:
        self.monitor_group(record.id).kill()
        super().clean(record)
        self.remove_monitor(record.id)
        for path in self.cgroups.group(PIVOT).directories:
            with contextlib.suppress(OSError):  # not there, or in use
                path.rmdir()

    def close(self) -> None:
        for path in (self._locks, *self._locks.parents):
            if path == LOCKS:
                break
            with contextlib.suppress(OSError):  # others' locks are in it
                path.rmdir()
        super().close()


def _open_to_all(path: Path) -> bool:
    """Return whether every directory above `path` may be passed by anyone."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
