"""Devices of CDI specs that others wrote (`/etc/cdi`, `/var/run/cdi`): those of the kinds that the node's operator allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from atoll.devices.cdi import FOREIGN_DIRECTORIES, CdiSpec, check_kind, find_device, read_directories
from atoll.devices.edits import merge_edits
from atoll.model.devices import OfferedDevice
from atoll.model.errors import AtollError, Forbidden
from atoll.model.ports.devices import Edits

OFFERED_MAX = 256
SHARED = ":shared"

log = structlog.get_logger()


def parse_allowed(text: str) -> dict[str, bool]:
    """Return the kinds in `vendor.com/class,vendor.com/class:shared`, each with whether its devices are shared. Raises Invalid."""
    allowed = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind = part.removesuffix(SHARED)
        check_kind(kind, "--cdi-devices")
        allowed[kind] = part.endswith(SHARED)
    return allowed


class ForeignDevices:
    """`allowed` are the kinds that may be asked for; none unless the operator says so. The port of this name."""

    def __init__(
        self, allowed: Mapping[str, bool], directories: Sequence[Path] = FOREIGN_DIRECTORIES, *, root: Path = Path("/")
    ) -> None:
        self._allowed = dict(allowed)
        self._directories = tuple(directories)
        self._root = root

    def offered(self) -> tuple[OfferedDevice, ...]:
        found: dict[str, OfferedDevice] = {}
        for spec in self._specs():
            for name in spec.devices:
                try:
                    spec.edits(name, root=self._root)
                except AtollError as error:
                    log.warning("a CDI device cannot be handed on", device=name, why=str(error))
                else:
                    found[name] = OfferedDevice(name=name, shared=self._allowed[spec.kind])
        return tuple(sorted(found.values(), key=lambda device: device.name))[:OFFERED_MAX]

    def add(self, edits: Edits, names: Sequence[str]) -> Edits:
        specs = self._specs() if names else ()
        for name in names:
            kind = name.partition("=")[0]
            if kind not in self._allowed:
                raise Forbidden(
                    f"{name}: the node's operator has not allowed devices of {kind}",
                    mend=f"start its agent with --cdi-devices {kind}",
                    field="resources.devices",
                )
            edits = merge_edits(edits, find_device(specs, name).edits(name, root=self._root))
        return edits

    def _specs(self) -> tuple[CdiSpec, ...]:
        """Return the allowed specs. One that is wrong takes only the directory that it is in out, and is told of."""
        specs: list[CdiSpec] = []
        for directory in self._directories if self._allowed else ():
            try:
                specs += [spec for spec in read_directories([directory]) if spec.kind in self._allowed]
            except (AtollError, OSError) as error:
                log.warning("CDI specs cannot be read", directory=str(directory), why=str(error))
        return tuple(specs)
