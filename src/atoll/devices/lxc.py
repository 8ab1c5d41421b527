"""How edits are written in a configuration of LXC (`lxc.container.conf(5)`): pure text, for the runtime that starts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atoll.devices.cdi_edits import LIBRARY_PATH, linked_mounts
from atoll.model.errors import Invalid
from atoll.model.ports.devices import Edits, FileMount


def lxc_lines(edits: Edits, *, cgroup: int = 2) -> list[str]:
    """Return the lines for a container whose rules begin with `lxc.cgroup2.devices.deny = a` (or v1's; `cgroup` says which).

    LXC makes no links: a link to a mounted file becomes a mount of it. Raises Invalid for a path or a value with a line break,
    and for a link to what is not mounted.
    """
    rules = "lxc.cgroup2.devices.allow" if cgroup == 2 else "lxc.cgroup.devices.allow"
    lines = [f"{rules} = c {node.major}:{node.minor} {node.permissions}" for node in edits.nodes]
    # The node's own file is shown: its mode and owner are the node's, since an unprivileged container can make no device file.
    lines += [_entry(FileMount(node.host_path, node.path, ("bind", "create=file"))) for node in edits.nodes]
    for mount in [*edits.mounts, *linked_mounts(edits)]:
        kind = "dir" if Path(mount.source).is_dir() else "file"
        lines.append(_entry(FileMount(mount.source, mount.target, (*mount.options, f"create={kind}"))))
    for path in edits.masked:
        lines.append(_entry(FileMount("tmpfs", path, ("ro", "nosuid", "nodev", "noexec", "optional", "size=0k")), "tmpfs"))
    for name, value in edits.env:
        lines.append(f"lxc.environment = {name}={value}")
    if edits.library_directories:
        lines.append(f"lxc.environment = {LIBRARY_PATH}={':'.join(edits.library_directories)}")
    for line in lines:
        if "\n" in line or "\0" in line:
            raise Invalid(f"a line break in {line!r}", field="resources.gpu")
    return lines


def _entry(mount: FileMount, kind: str = "none") -> str:
    return f"lxc.mount.entry = {_escaped(mount.source)} {_escaped(mount.target.lstrip('/'))} {kind} {_options(mount.options)} 0 0"


def _options(options: Sequence[str]) -> str:
    return ",".join(options)


def _escaped(path: str) -> str:
    """As in fstab(5)."""
    return path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
