"""What apps and jobs have in common."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import NAME_PATTERN, EnvName, Name, SpecRecord
from atoll.model.signals import signal_number
from atoll.model.spec.build import Build
from atoll.model.spec.gpu import Gpu, check_gpu
from atoll.model.spec.isolation import RUNTIMES_BY_ISOLATION, Isolation, RuntimeName
from atoll.model.spec.lifecycle import Lost, Stop, check_lost
from atoll.model.spec.network import NetworkRules, check_network
from atoll.model.spec.placement import Placement, check_placement
from atoll.model.spec.values import AbsolutePath, Argument, EnvValue, check_unique, default
from atoll.model.spec.volumes import Volume, check_volumes
from atoll.model.units import Bytes, Cores

DeviceName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9A-Z][-.a-z0-9A-Z]*/[-_.a-z0-9A-Z]+=[-_.:a-z0-9A-Z]+$",
        description="a device as VENDOR/CLASS=NAME",
        max_length=320,
    ),
]
"""CDI's fully qualified name of a device."""
DEVICE_RUNTIMES = (RuntimeName.RUNC, RuntimeName.CRUN, RuntimeName.LXC)
"""Runtimes that can hand on a device of a CDI spec."""


class Resources(SpecRecord, frozen=True, kw_only=True):
    """What each instance may use. All are limits; `cpu` and `memory` are also what placement reserves."""

    cpu: Cores = default(Cores(0.1))
    memory: Bytes = default(Bytes(128 << 20))
    disk: Bytes = default(Bytes(1 << 30))
    """Writable space of the instance's root; images and volumes do not count."""
    pids: Annotated[int, Meta(ge=1, le=4_194_304)] = 1024
    gpu: Gpu | None = None
    devices: Annotated[tuple[DeviceName, ...], Meta(max_length=16)] = ()
    """Of CDI specs of the node, by their full names: `vendor.com/class=name`."""


class Workload(SpecRecord, frozen=True, kw_only=True):
    """What apps and jobs have in common: the image and how to run it."""

    name: Name
    project: Name = "default"
    image: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    build: Build | None = None
    command: tuple[Argument, ...] = ()
    """Replaces the image's entry point and arguments; empty keeps them."""
    env: dict[EnvName, EnvValue] = {}
    secrets: dict[EnvName, Name] = {}
    """Environment variable → name of the project's secret."""
    workdir: AbsolutePath | None = None
    user: str | None = None
    resources: Resources = default(Resources())
    isolation: Isolation = Isolation.CONTAINER
    runtime: RuntimeName | None = None
    placement: Placement = default(Placement())
    stop: Stop = default(Stop())
    lost: Lost = default(Lost())
    volumes: Annotated[tuple[Volume, ...], Meta(max_length=32)] = ()
    network: NetworkRules | None = None
    read_only_root: bool = False
    labels: dict[str, str] = {}

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """The runtimes that may run this, preferred first."""
        return (self.runtime,) if self.runtime else RUNTIMES_BY_ISOLATION[self.isolation]


def check_workload(spec: Workload) -> None:
    """Raise Invalid for what the types alone do not rule out, naming the field."""
    if re.fullmatch(NAME_PATTERN, spec.project) is None:
        raise Invalid(f"project: {spec.project!r} is not a name", field="project")
    if spec.image is None and spec.build is None:
        raise Invalid("image: missing; give an image or a build", field="image", mend="add image = '…' or a [build] table")
    try:
        signal_number(spec.stop.signal)
    except Invalid as error:
        raise Invalid(f"stop.signal: {error}", field="stop.signal", mend=error.mend) from None
    if spec.runtime and spec.runtime not in RUNTIMES_BY_ISOLATION[spec.isolation]:
        names = ", ".join(RUNTIMES_BY_ISOLATION[spec.isolation])
        raise Invalid(
            f"runtime: {spec.runtime} does not give isolation '{spec.isolation}'",
            field="runtime",
            mend=f"use one of {names}, or change isolation",
        )
    if spec.resources.memory < 4 << 20:
        raise Invalid("resources.memory: below 4MiB nothing starts", field="resources.memory", mend="ask for 16MiB or more")
    if spec.resources.gpu is not None:
        check_gpu(spec.resources.gpu, spec.runtimes)
    if spec.resources.devices:
        check_unique(list(spec.resources.devices), "resources.devices", "name")
        if not set(spec.runtimes) & set(DEVICE_RUNTIMES):
            raise Invalid(
                f"resources.devices: {', '.join(spec.runtimes)} cannot hand on a device of a CDI spec",
                field="resources.devices",
                mend=f"use isolation 'container' with {', '.join(DEVICE_RUNTIMES)}",
            )
    check_lost(spec.lost)
    check_volumes(spec.volumes)
    if spec.network is not None:
        check_network(spec.network)
    check_placement(spec)
    both = sorted(set(spec.env) & set(spec.secrets))
    if both:
        raise Invalid(f"secrets: {both[0]} is also set in env", field=f"secrets.{both[0]}")
