"""CDI specs (Container Device Interface 1.1.0): read with strictness, written with the least version that their content needs.

Ours name every NVIDIA device of the node as `nvidia.com/gpu=UUID`, and need no hook: where the vendor's toolkit makes links to
a library by a program run at every start, the library is mounted under each of its names. So any tool that knows CDI can use
them without that toolkit. What is in a foreign spec is done as written or refused; a foreign program is never run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from atoll.devices.cdi_edits import container_edits, edits_of
from atoll.devices.cdi_schema import check, wrong
from atoll.model.devices import GpuDevice, GpuVendor
from atoll.model.errors import NotFound
from atoll.model.ports.devices import Edits

SPEC_BYTES_MAX = 4 << 20
SPECS_MAX = 256
"""Files of one directory."""
FOREIGN_DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))
"""Where others put their specs; the later directory wins."""
VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
_ENDINGS = (".json", ".yaml", ".yml")
_LABEL = r"[a-z0-9A-Z](?:[-a-z0-9A-Z]{0,61}[a-z0-9A-Z])?"
_VENDOR = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_VENDOR_MAX = 253
_CLASS = re.compile(r"[a-z0-9A-Z](?:[-_.a-z0-9A-Z]{0,61}[a-z0-9A-Z])?")
_DEVICE = re.compile(r"[a-z0-9A-Z](?:[-_.:a-z0-9A-Z]*[a-z0-9A-Z])?")
"""With the colon that reference implementations take too."""
_PARTS = ("env", "deviceNodes", "mounts")


class CdiSpec(Struct, frozen=True, kw_only=True):
    """A spec that was checked. `body` is as it was written."""

    source: str
    kind: str
    body: dict[str, Any]

    @property
    def devices(self) -> tuple[str, ...]:
        """The full names, as in `nvidia.com/gpu=GPU-…`."""
        return tuple(f"{self.kind}={device['name']}" for device in self.body["devices"])

    def edits(self, name: str, *, root: Path = Path("/")) -> Edits:
        """Return what the device `name` (full, or without its kind) needs, the spec's common part included.

        Raises NotFound; Invalid or Unsupported for what cannot be done as written, naming file and field.
        """
        short = name.removeprefix(f"{self.kind}=")
        for index, device in enumerate(self.body["devices"]):
            if device["name"] == short:
                return edits_of(
                    [
                        ("containerEdits", self.body.get("containerEdits", {})),
                        (f"devices[{index}].containerEdits", device["containerEdits"]),
                    ],
                    name=f"{self.kind}={short}",
                    source=self.source,
                    root=root,
                )
        raise NotFound(f"{self.source}: there is no device {name}", mend=f"there are {', '.join(self.devices)}")


def read_spec(data: bytes, source: str) -> CdiSpec:
    """Return the spec in `data`, JSON or YAML by the ending of `source`. Raises Invalid, naming source and field."""
    if len(data) > SPEC_BYTES_MAX:
        raise wrong(source, "", f"it is longer than {SPEC_BYTES_MAX >> 20} MiB")
    try:
        body = json.loads(data) if source.endswith(".json") else yaml.safe_load(data)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise wrong(source, "", f"it cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from None
    return checked(body, source)


def checked(body: object, source: str) -> CdiSpec:
    """As `read_spec`, of what was decoded already."""
    spec = check(body, source)
    check_kind(spec["kind"], source)
    if not spec["devices"]:
        raise wrong(source, "devices", "it names no device")
    seen: set[str] = set()
    for index, device in enumerate(spec["devices"]):
        name = device["name"]
        if not _DEVICE.fullmatch(name):
            mend = "letters, digits and -_.: with a letter or digit at either end"
            raise wrong(source, f"devices[{index}].name", f"{name!r} cannot name a device", mend)
        if name in seen:
            raise wrong(source, f"devices[{index}].name", f"{name!r} is given twice")
        seen.add(name)
    _check_version(spec, source)
    return CdiSpec(source=source, kind=spec["kind"], body=spec)


def check_kind(kind: str, source: str) -> None:
    """Raise Invalid, naming the source, for what is not of the form vendor.com/class."""
    vendor, slash, name = kind.partition("/")
    if not slash or len(vendor) > _VENDOR_MAX or not _VENDOR.fullmatch(vendor) or not _CLASS.fullmatch(name):
        raise wrong(source, "kind", f"{kind!r} is not of the form vendor.com/class")


def _check_version(spec: dict[str, Any], source: str) -> None:
    given = spec["cdiVersion"]
    if given not in VERSIONS:
        raise wrong(source, "cdiVersion", f"{given!r} is no version that is known here", f"known are {', '.join(VERSIONS)}")
    needed, why = _needed(spec)
    if VERSIONS.index(given) < VERSIONS.index(needed):
        raise wrong(source, why, f"this needs CDI {needed}, but cdiVersion says {given}", f"write cdiVersion {needed}")
    for at, edits in _all_edits(spec):
        for name in ("enableCMT", "enableMBM"):
            if given == "1.1.0" and name in edits.get("intelRdt", {}):
                raise wrong(source, f"{at}.intelRdt.{name}", "CDI 1.1.0 has it no more", "write enableMonitoring")


def minimum_version(spec: dict[str, Any]) -> str:
    """Return the least CDI version in which everything that `spec` uses is defined."""
    return _needed(spec)[0]


def _needed(spec: dict[str, Any]) -> tuple[str, str]:
    """Return the version and the field that asks for it."""
    needs = [("0.3.0", "")]
    if spec.get("annotations"):
        needs.append(("0.6.0", "annotations"))
    if "." in spec["kind"].partition("/")[2]:
        needs.append(("0.6.0", "kind"))
    for index, device in enumerate(spec["devices"]):
        if device.get("annotations"):
            needs.append(("0.6.0", f"devices[{index}].annotations"))
        if not device["name"][:1].isalpha():
            needs.append(("0.5.0", f"devices[{index}].name"))
    for at, edits in _all_edits(spec):
        rdt = edits.get("intelRdt", {})
        if edits.get("netDevices"):
            needs.append(("1.1.0", f"{at}.netDevices"))
        if "schemata" in rdt or "enableMonitoring" in rdt:
            needs.append(("1.1.0", f"{at}.intelRdt"))
        for name in ("intelRdt", "additionalGids"):
            if edits.get(name):
                needs.append(("0.7.0", f"{at}.{name}"))
        needs += [
            ("0.5.0", f"{at}.deviceNodes[{i}].hostPath")
            for i, node in enumerate(edits.get("deviceNodes", ()))
            if "hostPath" in node
        ]
        needs += [("0.4.0", f"{at}.mounts[{i}].type") for i, entry in enumerate(edits.get("mounts", ())) if "type" in entry]
    return max(needs, key=lambda need: VERSIONS.index(need[0]))


def _all_edits(spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    inner = [(f"devices[{index}].containerEdits", device["containerEdits"]) for index, device in enumerate(spec["devices"])]
    return [("containerEdits", spec.get("containerEdits", {})), *inner]


def read_directories(directories: Sequence[Path] = FOREIGN_DIRECTORIES) -> tuple[CdiSpec, ...]:
    """Return all specs of the directories. One that is not there has none. Raises Invalid for the first that is wrong."""
    found = []
    for directory in directories:
        names = sorted(path for path in directory.iterdir() if path.suffix in _ENDINGS) if directory.is_dir() else []
        for path in names[:SPECS_MAX]:
            with path.open("rb") as file:
                found.append(read_spec(file.read(SPEC_BYTES_MAX + 1), str(path)))
    return tuple(found)


def find_device(specs: Sequence[CdiSpec], name: str) -> CdiSpec:
    """Return the spec that has the device of this full name; of several the last. Raises NotFound with those that exist."""
    for spec in reversed(specs):
        if name in spec.devices:
            return spec
    known = list(itertools.chain.from_iterable(spec.devices for spec in specs))
    raise NotFound(f"no CDI spec of this node has the device {name}", mend=f"there are {', '.join(known) or 'none at all'}")


def make_spec(kind: str, devices: Mapping[str, Edits], source: str = "made here") -> CdiSpec:
    """Return a spec of the devices, by their short names. What all of several devices share stands in it once.

    Raises Invalid for a name, a kind or edits that CDI cannot express.
    """
    each = {name: container_edits(edits, source) for name, edits in devices.items()}
    common: dict[str, Any] = {}
    for part in ("env", "mounts"):
        first = next(iter(each.values()), {}).get(part, [])
        shared = [entry for entry in first if all(entry in edits.get(part, ()) for edits in each.values())]
        if shared:
            common[part] = shared
            for edits in each.values():
                edits[part] = [entry for entry in edits[part] if entry not in shared]
    body: dict[str, Any] = {
        "cdiVersion": VERSIONS[0],
        "kind": kind,
        "devices": [
            {"name": name, "containerEdits": {part: edits[part] for part in _PARTS if edits.get(part)}}
            for name, edits in each.items()
        ],
    }
    if common:
        body["containerEdits"] = common
    body["cdiVersion"] = minimum_version(body)
    return checked(body, source)


def write_spec(directory: Path, spec: CdiSpec) -> Path:
    """Write the spec as JSON, whole or not at all; return its path. A repeat replaces it. Blocking."""
    directory.mkdir(parents=True, exist_ok=True)
    path = _path_of(directory, spec.kind)
    partial = path.with_name(f".{path.name}.next")
    with partial.open("w") as file:
        json.dump(spec.body, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return path


def write_inventory(
    directory: Path, vendor: GpuVendor, devices: Sequence[GpuDevice], edits: Callable[[GpuDevice], Edits]
) -> Path | None:
    """Write the spec of a vendor's devices that are handed on whole, by their ids; return its path. Blocking.

    A device in MIG mode has partitions that come and go, and is left out. Without devices there is no spec, nor the one of
    before. Raises what `edits` raises; the spec of before stays then.
    """
    whole = {device.id: edits(device) for device in devices if device.vendor is vendor and not device.mig}
    kind = f"{vendor}.com/gpu"
    if not whole:
        _path_of(directory, kind).unlink(missing_ok=True)
        return None
    return write_spec(directory, make_spec(kind, whole))


def _path_of(directory: Path, kind: str) -> Path:
    return directory / f"{kind.replace('/', '-')}.json"
