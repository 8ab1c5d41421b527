"""What apps' and jobs' specs have in common when they come in: rules make sense, the image is pinned, the secrets are there."""

from __future__ import annotations

import re
from typing import TypeVar

from msgspec.structs import replace

from atoll.api.service.access import Caller
from atoll.api.service.context import Context
from atoll.model.errors import Forbidden, ImageError, Invalid, NotFound
from atoll.model.records import Ingress, Project, Secret
from atoll.model.spec import HOST_PORT_MIN, AppSpec, PortProtocol, Workload
from atoll.scheduling.constraints import problem

W = TypeVar("W", bound=Workload)
CELL_REGISTRY = "cell.internal/"
_REFERENCE = re.compile(
    r"(?P<repository>[a-z0-9][a-z0-9._/-]{0,200})"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?P<digest>@sha256:[0-9a-f]{64})?"
)


def require_image(spec: Workload) -> None:
    """Raise Invalid for a spec that only says how to build the image."""
    if spec.image is None:
        mend = "'atoll deploy' builds it, pushes it and sets this"
        raise Invalid("image: missing; the server does not build", field="image", mend=mend)


def check_constraints(spec: Workload) -> None:
    """Raise Invalid for a constraint that no node could be held against: a bad expression, or no rule on versions."""
    for index, constraint in enumerate(spec.placement.constraints):
        wrong = problem(constraint)
        if wrong is not None:
            field = f"placement.constraints[{index}].value"
            raise Invalid(f"{field}: {wrong.message}", field=field, mend=wrong.mend or None)


def check_host_ports(context: Context, spec: AppSpec) -> None:
    """Raise Invalid for a port of nodes that an ingress of the cell has, Forbidden for one below what the project may publish."""
    project = context.state.get(Project, spec.project)
    quota = project.record.quota if project is not None else None
    least = quota.host_port_min if quota is not None else HOST_PORT_MIN
    known = context.state.records(Ingress).items()
    of_ingresses = {port: name for name, held in known for port in (held.record.http_port, held.record.https_port) if port}
    for index, port in enumerate(spec.ports):
        field = f"ports[{index}].host"
        if port.host is None:
            continue
        if port.host < least:
            mend = f"use {least} or above, or have an admin set the project's quota with host_port_min = {port.host}"
            raise Forbidden(f"{field}: project '{spec.project}' may not publish port {port.host}", field=field, mend=mend)
        if port.protocol is not PortProtocol.UDP and port.host in of_ingresses:
            what = f"{port.host} is where ingress '{of_ingresses[port.host]}' answers"
            raise Invalid(f"{field}: {what}", field=field, mend="choose another; http ports need none: the ingress routes to them")


def check_public_ports(context: Context, spec: AppSpec) -> None:
    """Raise Forbidden for a port of ingresses that the project may not have, Invalid for one that ingresses answer HTTP at."""
    project = context.state.get(Project, spec.project)
    quota = project.record.quota if project is not None else None
    known = context.state.records(Ingress).items()
    for index, wanted in enumerate(spec.ingress.ports if spec.ingress is not None else ()):
        field = f"ingress.ports[{index}].public"
        if quota is None or not quota.may_publish(wanted.public):
            allowed = quota.public_ports if quota is not None else ""
            grant = f"have an admin run `atoll projects quota {spec.project} --public-ports FIRST-LAST`"
            mend = f"choose one of {allowed}" if allowed else grant
            raise Forbidden(f"{field}: project '{spec.project}' may not have port {wanted.public}", field=field, mend=mend)
        taken = [name for name, held in known if wanted.public in (held.record.http_port, held.record.https_port)]
        if taken:
            what = f"{wanted.public} is where ingress '{taken[0]}' answers HTTP"
            raise Invalid(f"{field}: {what}", field=field, mend="choose another")


def pin(context: Context, caller: Caller, spec: W) -> W:
    """Return the spec with its images, those of its volumes too, named by digest where they are in the cell's own registry, so
    that a release never changes.

    Raises ImageError when one is not there, Forbidden for another project's image that `caller` may not see.
    """
    volumes = tuple(
        replace(volume, image=_pinned(context, caller, spec, volume.image, f"volumes[{index}].image"))
        for index, volume in enumerate(spec.volumes)
    )
    return replace(spec, image=_pinned(context, caller, spec, spec.image, "image"), volumes=volumes)


def _pinned(context: Context, caller: Caller, spec: Workload, reference: str | None, field: str) -> str | None:
    if reference is None or not reference.startswith(CELL_REGISTRY):
        return reference
    match = _REFERENCE.fullmatch(reference.removeprefix(CELL_REGISTRY))
    if match is None or "/" not in match["repository"]:
        raise Invalid(f"{field}: {reference!r} is not {CELL_REGISTRY}PROJECT/NAME[:TAG][@DIGEST]", field=field)
    project = match["repository"].split("/", 1)[0]
    if project != spec.project and not caller.sees(project):
        raise Forbidden(f"{field}: {reference} is another project's", field=field)
    if match["digest"]:
        return reference
    tag = match["tag"] or "latest"
    digest = context.images.digest_of(match["repository"], tag) if context.images else None
    if digest is None:
        mend = "push it first, e.g. with 'atoll deploy'" if field == "image" else "push it first, with 'atoll build --tag TAG'"
        raise ImageError(f"{field}: {reference} is not in the cell's registry", field=field, mend=mend)
    return f"{CELL_REGISTRY}{match['repository']}:{tag}@{digest}"


def pinned_digests(spec: Workload) -> set[str]:
    """Return the digests of the cell's own images that the spec names."""
    images = [spec.image or "", *(volume.image or "" for volume in spec.volumes)]
    return {image.rpartition("@")[2] for image in images if image.startswith(CELL_REGISTRY) and "@" in image}


def check_secrets(context: Context, spec: Workload) -> None:
    """Raise NotFound for a secret that the spec names and the project does not have."""
    for variable, name in spec.secrets.items():
        if context.state.get(Secret, f"{spec.project}/{name}") is None:
            raise NotFound(
                f"secrets.{variable}: project '{spec.project}' has no secret '{name}'",
                field=f"secrets.{variable}",
                mend=f"set it with 'atoll secrets set {name}'",
            )
