"""An instance's configuration in LXC's words (`lxc.container.conf(5)`), made from the one that the OCI runtimes get.

So all isolation is decided in one place (`oci.py`): what runc is told, LXC is told too. What LXC has no words for, or none that are
safe (the process, its environment, its system call filter), `native/inside.c` does.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from atoll.model.errors import Invalid
from atoll.runtimes.cgroup import Cgroups

ENTRY_BYTES_MAX = 4_000
"""LXC reads a mount entry into one page."""
NODES = ("null", "zero", "full", "random", "urandom", "tty")
"""The devices that every OCI runtime gives by itself."""
_RULES = ("c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm", "c 136:* rwm")
"""Those devices, and terminals."""
PTYS_MAX = 1024
MONITOR = "_monitor_"
"""What goes before an instance's name in that of the group where LXC's own process is; no instance's name begins so."""
_KERNEL_DIRECTORIES = frozenset({"/proc", "/sys", "/dev"})

Point = Callable[[str, bool], str]
"""Makes a mount point of a path (True for a directory), and returns the path without links."""


def configuration_lines(config: dict[str, Any], *, netns: Path | None, cgroups: Cgroups, point: Point) -> str:
    """Return LXC's configuration for an OCI configuration. `netns` is the network namespace to join, or None for one of its own.

    Raises Invalid for what cannot be written in it (a line break, a mount over the kernel's own files), and what `point` raises.
    """
    linux = config["linux"]
    parent, _, name = linux["cgroupsPath"].strip("/").rpartition("/")
    pairs: list[tuple[str, str]] = [
        ("lxc.uts.name", config["hostname"]),
        ("lxc.rootfs.path", f"dir:{config['root']['path']}"),
        ("lxc.rootfs.options", "ro" if config["root"]["readonly"] else "rw"),
        # The process has its output, and no terminal; and it must outlive LXC's monitor, whose part the shim takes over.
        ("lxc.console.path", "none"),
        ("lxc.tty.max", "0"),
        ("lxc.pty.max", str(PTYS_MAX)),
        ("lxc.autodev", "0"),
        ("lxc.mount.auto", "cgroup:ro:force"),
        ("lxc.monitor.signal.pdeath", "0"),
        ("lxc.apparmor.profile", "unconfined"),
        ("lxc.no_new_privs", "1"),
        ("lxc.cap.keep", " ".join(_capability(name) for name in config["process"]["capabilities"]["bounding"])),
        ("lxc.cgroup.dir.container", posixpath.join(parent, name)),
        ("lxc.cgroup.dir.monitor", posixpath.join(parent, MONITOR + name)),
    ]
    for kind, ids in (("u", linux.get("uidMappings", ())), ("g", linux.get("gidMappings", ()))):
        pairs += [("lxc.idmap", f"{kind} {each['containerID']} {each['hostID']} {each['size']}") for each in ids]
    pairs += [("lxc.net.0.type", "empty")] if netns is None else [("lxc.namespace.share.net", str(netns))]
    for limit in config["process"]["rlimits"]:
        pairs.append((f"lxc.prlimit.{limit['type'].removeprefix('RLIMIT_').lower()}", f"{limit['soft']}:{limit['hard']}"))
    pairs += _limits(linux["resources"], cgroups)
    pairs += [("lxc.mount.entry", entry) for entry in _entries(config, point)]
    return "".join(_line(key, value) for key, value in pairs)


def _line(key: str, value: str) -> str:
    if any(character < " " for character in value):
        raise Invalid(f"a line break or control character in {key} ({value!r})", field="hostname" if "uts" in key else "")
    return f"{key} = {value}\n"


def _capability(name: str) -> str:
    return name.removeprefix("CAP_").lower()


def _limits(resources: dict[str, Any], cgroups: Cgroups) -> Iterator[tuple[str, str]]:
    memory, cpu, pids = resources["memory"], resources["cpu"], resources["pids"]
    if cgroups.pure:
        prefix = "lxc.cgroup2"
        values = {
            "memory.max": memory["limit"],
            "memory.swap.max": max(0, memory["swap"] - memory["limit"]) if "swap" in memory else None,
            "cpu.max": f"{cpu['quota']} {cpu['period']}",
            "cpu.weight": 1 + (cpu["shares"] - 2) * 9999 // 262_142,  # as the OCI runtimes convert it
        }
    else:
        prefix = "lxc.cgroup"
        values = {
            "memory.limit_in_bytes": memory["limit"],
            "memory.memsw.limit_in_bytes": memory.get("swap"),
            "cpu.cfs_period_us": cpu["period"],
            "cpu.cfs_quota_us": cpu["quota"],
            "cpu.shares": cpu["shares"],
        }
    values["pids.max"] = pids["limit"]
    yield from ((f"{prefix}.{name}", str(value)) for name, value in values.items() if value is not None)
    yield f"{prefix}.devices.deny", "a"
    granted = (f"{rule['type']} {rule['major']}:{rule['minor']} {rule['access']}" for rule in resources["devices"] if rule["allow"])
    yield from ((f"{prefix}.devices.allow", rule) for rule in (*_RULES, *granted))


def _entries(config: dict[str, Any], point: Point) -> Iterator[str]:
    above: list[str] = []
    for mount in config["mounts"]:
        target, kind = posixpath.normpath(mount["destination"]), mount["type"]
        if kind in {"cgroup", "devpts"}:  # LXC makes them: lxc.mount.auto, lxc.pty.max
            continue
        if kind == "bind" and (target == "/" or target in _KERNEL_DIRECTORIES - {"/sys"} or target.startswith("/proc/")):
            raise Invalid(f"nothing can be mounted at {target}", mend="choose another path for the volume", field="volumes")
        directory = kind != "bind" or Path(mount["source"]).is_dir()
        options = list(mount["options"])
        if any(target.startswith(f"{path}/") for path in above):
            options.append("create=dir" if directory else "create=file")  # where it will lie is mounted at the start only
        else:
            found = point(target, directory)
            if target in _KERNEL_DIRECTORIES and found != target:
                raise Invalid(f"the image's {target} is a link to {found}", mend="make it a directory", field="image")
            target = found
        above.append(target)
        yield _entry(mount["source"], target, "none" if kind == "bind" else kind, options)
        if target == "/dev":
            yield from (_entry(f"/dev/{name}", f"/dev/{name}", "none", ["bind", "create=file"]) for name in NODES)
    for path in config["linux"]["maskedPaths"]:
        if Path(path).is_dir():
            yield _entry("tmpfs", path, "tmpfs", ["ro", "nosuid", "nodev", "noexec", "optional", "size=0k"])
        else:
            yield _entry("dev/null", path, "none", ["bind", "relative", "optional"])
    for path in config["linux"]["readonlyPaths"]:
        yield _entry(path.lstrip("/"), path, "none", ["bind", "relative", "ro", "nosuid", "nodev", "noexec", "optional"])


def _entry(source: str, target: str, kind: str, options: Sequence[str]) -> str:
    line = f"{_escaped(source)} {_escaped(target.lstrip('/'))} {kind} {','.join(options)} 0 0"
    if len(line.encode(errors="surrogateescape")) > ENTRY_BYTES_MAX:
        raise Invalid(f"the path of a mount is too long: {target[:80]}…", mend="choose a shorter one", field="volumes")
    return line


def _escaped(path: str) -> str:
    """As in fstab(5)."""
    return path.translate({ord(character): f"\\{ord(character):03o}" for character in " \t\n\\#"})
