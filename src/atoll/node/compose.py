"""From an assignment and what was prepared for it to the Box that a runtime takes: pure, every choice is made here."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.model.errors import Invalid
from atoll.model.ports.devices import Edits
from atoll.model.ports.images import Image
from atoll.model.ports.network import Link
from atoll.model.ports.runtime import Box, Limits, Mount, WorkerCode
from atoll.model.records import Assignment, OwnerKind
from atoll.model.spec import CALLER_CA, AppSpec, JobSpec, Port, Workload
from atoll.model.worker import ALIVE

PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def ports_of(workload: Workload) -> tuple[Port, ...]:
    return workload.ports if isinstance(workload, AppSpec) else ()


def knows_callers(workload: Workload) -> bool:
    """Whether its instances are handed the authority that ingresses show themselves by."""
    return isinstance(workload, AppSpec) and workload.ingress is not None and workload.ingress.mutual


def argv_of(workload: Workload, image: Image) -> tuple[str, ...]:
    """Return the command. Raises Invalid when neither the spec nor the image has one."""
    argv = workload.command or (*image.config.entrypoint, *image.config.command)
    if not argv or not argv[0]:
        raise Invalid(
            f"nothing to run: the image {image.reference} has neither an entry point nor a command",
            mend="add command = […] to the spec",
            field="command",
        )
    return argv


def env_of(assignment: Assignment, image: Image, secrets: Mapping[str, str], node: str) -> tuple[tuple[str, str], ...]:
    """Return the environment: the image's, then Atoll's own, then the spec's, then secrets; later ones win."""
    instance, workload = assignment.instance, assignment.workload
    env: dict[str, str] = {"PATH": PATH_DEFAULT}
    for line in image.config.env:
        name, _, value = line.partition("=")
        if name:
            env[name] = value
    env |= {"ATOLL_PROJECT": instance.project, "ATOLL_INSTANCE": instance.id, "ATOLL_NODE": node}
    if instance.owner_kind is OwnerKind.JOB:
        env |= {"ATOLL_JOB": instance.owner, "ATOLL_INDEX": str(instance.index), "ATOLL_ATTEMPT": str(instance.attempt)}
    else:
        env["ATOLL_APP"] = instance.owner
    ports = ports_of(workload)
    if ports:
        env["PORT"] = str(ports[0].port)
    if knows_callers(workload):
        env["ATOLL_INGRESS_CA"] = CALLER_CA
    env |= workload.env
    env |= secrets
    return tuple(env.items())


def worker_of(workload: Workload, env: Sequence[tuple[str, str]]) -> WorkerCode | None:
    """Return what makes the box a worker. It sees what the spec and Atoll say as variables, and not what an image does."""
    if not isinstance(workload, AppSpec) or workload.worker is None:
        return None
    port, alive = workload.port_named(None), workload.port_named(ALIVE)
    if port is None:
        raise Invalid("ports: a worker listens on one port, which speaks http", field="ports", mend="leave ports out")
    own = {name for name, _ in env if name.startswith("ATOLL_")}
    return WorkerCode(
        worker=workload.worker,
        project=workload.project,
        port=port.port,
        alive_port=alive.port if alive else None,
        bindings=tuple(sorted(own | workload.env.keys() | workload.secrets.keys())),
    )


def stop_signal_of(image: Image) -> str | None:
    """Return the image's stop signal as a name such as `SIGQUIT`; None for none, or one that this system lacks."""
    wanted = (image.config.stop_signal or "").strip().upper()
    if not wanted:
        return None
    try:
        if wanted.isdigit():
            return signal.Signals(int(wanted)).name
        return signal.Signals[wanted if wanted.startswith("SIG") else f"SIG{wanted}"].name
    except (ValueError, KeyError):
        return None


def compose(
    assignment: Assignment,
    *,
    node: str,
    directory: Path,
    image: Image,
    link: Link | None,
    secrets: Mapping[str, str],
    mounts: Sequence[Mount],
    devices: Edits = Edits(),
    stdout: Path,
    stderr: Path,
) -> Box:
    """Return the box. Raises Invalid, naming the field, for a spec that this image cannot fulfil."""
    workload = assignment.workload
    resources = workload.resources
    env = env_of(assignment, image, secrets, node)
    worker = worker_of(workload, env)
    return Box(
        id=assignment.instance.id,
        directory=directory,
        image=image,
        argv=() if worker else argv_of(workload, image),
        env=env,
        workdir=workload.workdir or image.config.workdir or "/",
        user=workload.user if workload.user is not None else image.config.user,
        hostname=assignment.instance.id,
        limits=Limits(
            cpu_milli=resources.cpu.milli,
            memory_bytes=int(resources.memory),
            disk_bytes=int(resources.disk),
            pids=resources.pids,
        ),
        mounts=tuple(mounts),
        devices=devices,
        worker=worker,
        read_only_root=workload.read_only_root,
        netns=link.netns if link else None,
        resolv_conf=link.resolv_conf if link else None,
        stdout=stdout,
        stderr=stderr,
        attended=isinstance(workload, JobSpec) and workload.sandbox,
    )
