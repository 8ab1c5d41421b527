"""From CDI's containerEdits to the edits that a runtime takes, and back.

Of hooks only those are taken whose work is known and is done here in another way; their program is never run. What an instance
cannot be given (a network device, a cache partition, more groups) is refused, not dropped.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.devices.cdi_schema import wrong
from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount

LIBRARY_PATH = "LD_LIBRARY_PATH"
_UNKNOWN_DEVICE = (-1, -1)
_HOOK_PROGRAMS = ("nvidia-cdi-hook", "nvidia-ctk")
_DONE_ANYWAY = ("chmod", "disable-device-node-modification")
"""Directories are made open to all, and no device file can be made or changed: the device rules of the control group forbid it."""
_CHARACTER = ("", "c", "u")
_NOT_GIVEN = ("netDevices", "intelRdt", "additionalGids")
_TARGETS_REFUSED = ("/proc", "/sys", "/")
_BIND_TYPES = ("", "none", "bind")
_NOT_SHARED = ("private", "rprivate", "slave", "rslave")
_MOUNT_OPTIONS = frozenset(
    ("ro", "rw", "bind", "rbind", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "relatime", *_NOT_SHARED)
)
"""Those with which nothing that is mounted inside comes to the node."""


def edits_of(parts: Sequence[tuple[str, dict[str, Any]]], *, name: str, source: str, root: Path = Path("/")) -> Edits:
    """Return the edits of several containerEdits (field, content) together, as the device `name` needs them.

    Numbers of devices that are not given are looked up below `root`. Raises Invalid for what contradicts itself and
    Unsupported for what cannot be done, naming `source` and the field.
    """
    nodes: dict[str, DeviceNode] = {}
    mounts: dict[str, FileMount] = {}
    env: dict[str, str] = {}
    directories: list[str] = []
    links: dict[str, str] = {}
    for at, content in parts:
        for part in _NOT_GIVEN:
            if content.get(part):
                raise Unsupported(f"{source}: {at}.{part}: an instance cannot be given this", field=f"{at}.{part}")
        for index, node in enumerate(content.get("deviceNodes", ())):
            made = _device_node(node, f"{at}.deviceNodes[{index}]", source, root)
            nodes[made.path] = made
        for index, entry in enumerate(content.get("mounts", ())):
            mount = _file_mount(entry, f"{at}.mounts[{index}]", source)
            mounts[mount.target] = mount
        for index, line in enumerate(content.get("env", ())):
            variable, equals, value = line.partition("=")
            if not equals or not variable or "\0" in line:
                raise wrong(source, f"{at}.env[{index}]", f"{line!r} is not of the form NAME=VALUE")
            if variable == LIBRARY_PATH:  # an instance may have one of its own, which goes on behind it
                directories += [directory for directory in value.split(":") if directory.startswith("/")]
            else:
                env[variable] = value
        for index, hook in enumerate(content.get("hooks", ())):
            _do_hook(hook, f"{at}.hooks[{index}]", source, directories, links)
    return Edits(
        nodes=tuple(nodes.values()),
        mounts=tuple(mounts.values()),
        env=tuple(env.items()),
        library_directories=tuple(dict.fromkeys(directories)),
        links=tuple(links.items()),
        devices=(name,),
    )


def _device_node(node: dict[str, Any], at: str, source: str, root: Path) -> DeviceNode:
    path, host = _absolute(node["path"], f"{at}.path", source), node.get("hostPath", node["path"])
    _absolute(host, f"{at}.hostPath", source)
    if not path.startswith("/dev/"):
        raise Unsupported(f"{source}: {at}.path: {path} is not below /dev", field=f"{at}.path")
    if node.get("type", "") not in _CHARACTER:
        raise Unsupported(f"{source}: {at}.type: only character devices are handed on, not {node['type']!r}", field=f"{at}.type")
    for owner in ("uid", "gid"):
        if node.get(owner):
            raise Unsupported(f"{source}: {at}.{owner}: a device file inside belongs to root", field=f"{at}.{owner}")
    permissions = node.get("permissions", "rw")
    if not permissions or set(permissions) - set("rwm"):
        raise wrong(source, f"{at}.permissions", f"{permissions!r} is not made of r, w and m")
    numbers = (node.get("major", -1), node.get("minor", -1))
    if numbers == _UNKNOWN_DEVICE:
        numbers = _numbers(root / host.lstrip("/"), at, source)
    if min(numbers) < 0:
        raise wrong(source, at, "it has one of major and minor only")
    return DeviceNode(path, host, *numbers, permissions=permissions, mode=node.get("fileMode", 0o666) & 0o777)


def _numbers(path: Path, at: str, source: str) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise Unsupported(f"{source}: {at}: {path}: {error.strerror}", field=at, mend="is its driver loaded?") from None
    if not stat.S_ISCHR(found.st_mode):
        raise Unsupported(f"{source}: {at}: {path} is no character device", field=at)
    return os.major(found.st_rdev), os.minor(found.st_rdev)


def _file_mount(entry: dict[str, Any], at: str, source: str) -> FileMount:
    target = _absolute(entry["containerPath"], f"{at}.containerPath", source)
    _absolute(entry["hostPath"], f"{at}.hostPath", source)
    if any(target == refused or (refused != "/" and target.startswith(refused + "/")) for refused in _TARGETS_REFUSED):
        raise Unsupported(f"{source}: {at}.containerPath: nothing is mounted at {target}", field=f"{at}.containerPath")
    if entry.get("type", "") not in _BIND_TYPES:
        raise Unsupported(f"{source}: {at}.type: only files of the node are mounted, not {entry['type']!r}", field=f"{at}.type")
    options = tuple(entry.get("options", ())) or FileMount("", "").options
    for index, option in enumerate(options):
        if option not in _MOUNT_OPTIONS:
            raise Unsupported(
                f"{source}: {at}.options[{index}]: {option!r} is not given to an instance", field=f"{at}.options[{index}]"
            )
    if not {"bind", "rbind"} & set(options):
        options = (*options, "rbind")
    return FileMount(entry["hostPath"], target, options)


def _absolute(path: str, at: str, source: str) -> str:
    if not path.startswith("/") or "\0" in path or "\n" in path or any(part in ("..", ".") for part in path.split("/")):
        raise wrong(source, at, f"{path!r} is not an absolute path without . and ..")
    return path


def _do_hook(hook: dict[str, Any], at: str, source: str, directories: list[str], links: dict[str, str]) -> None:
    words = hook.get("args", [])[1:]
    if Path(hook["path"]).name in _HOOK_PROGRAMS:
        if words[:1] == ["hook"]:
            words = words[1:]
        values = _options(words[1:])
        match words[:1]:
            case ["update-ldcache"] if values is not None and set(values) <= {"folder", "ldconfig-path"}:
                directories += [_absolute(folder, f"{at}.args", source) for folder in values.get("folder", ())]
                return
            case ["create-symlinks"] if values is not None and set(values) <= {"link"}:
                for link in values.get("link", ()):
                    target, separator, path = link.partition("::")
                    if not separator or not target:
                        raise wrong(source, f"{at}.args", f"{link!r} is not of the form TARGET::LINK")
                    links[_absolute(path, f"{at}.args", source)] = target
                return
            case [word] if word in _DONE_ANYWAY:
                return
    shown = " ".join([Path(hook["path"]).name, *words[:1]])
    raise Unsupported(
        f"{source}: {at}: the hook {shown!r} is a foreign program that would run as root, and is not known here",
        mend="known are update-ldcache and create-symlinks: make the spec without it (nvidia-ctk cdi generate --disable-hook)",
        field=at,
    )


def _options(words: Sequence[str]) -> dict[str, list[str]] | None:
    """Return the values of `--name value` and `--name=value`; None for anything else."""
    found: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or (not equals and not rest):
            return None
        found.setdefault(name, []).append(value if equals else rest.pop(0))
    return found


def container_edits(edits: Edits, source: str = "made here") -> dict[str, Any]:
    """Return `edits` as CDI's containerEdits, without hooks: a link to a mounted file is a mount of that file.

    Raises Invalid for a link to what is not among the mounts.
    """
    content: dict[str, Any] = {}
    env = [f"{name}={value}" for name, value in edits.env]
    if edits.library_directories:
        env.append(f"{LIBRARY_PATH}={':'.join(edits.library_directories)}")
    if env:
        content["env"] = env
    if edits.nodes:
        content["deviceNodes"] = [_written_node(node) for node in edits.nodes]
    mounts = [*edits.mounts, *linked_mounts(edits, source)]
    if mounts:
        content["mounts"] = [
            {"hostPath": entry.source, "containerPath": entry.target, "options": list(entry.options)} for entry in mounts
        ]
    return content


def linked_mounts(edits: Edits, source: str = "made here") -> list[FileMount]:
    """Return, for each link, a mount of the file that it leads to. Raises Invalid where that is none of the mounts."""
    there = {entry.target: entry for entry in edits.mounts}
    links = dict(edits.links)
    made = []
    for path in links:
        goal = path
        for _ in range(len(links)):
            if goal not in links:
                break
            goal = os.path.normpath(Path(goal).parent / links[goal])
        if goal not in there:
            raise wrong(source, "links", f"{path} leads to {goal}, which is not mounted")
        made.append(FileMount(there[goal].source, path, there[goal].options))
    return made


def _written_node(node: DeviceNode) -> dict[str, Any]:
    written: dict[str, Any] = {"path": node.path}
    if node.host_path != node.path:
        written["hostPath"] = node.host_path
    written |= {"type": "c", "major": node.major, "minor": node.minor, "permissions": node.permissions}
    if node.mode != 0o666:
        written["fileMode"] = node.mode
    return written
