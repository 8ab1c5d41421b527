"""Which image an instance gets: a digest always means the same, a tag what it means when a release first comes to this node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from atoll.model.errors import AtollError
from atoll.model.ports.images import Image, PullProgress
from atoll.model.records import Instance, Severity
from atoll.node.tools import Tools

LOOK_UP_S = 5.0
"""How long a registry has to say what a tag means now, where an image of that name is here."""

log = structlog.get_logger()


async def choose_image(
    tools: Tools,
    instance: Instance,
    reference: str,
    digest: str | None,
    progress: Callable[[PullProgress], None],
    *,
    volume: str | None = None,
) -> Image:
    """Return the image for `instance`, or for a volume of it, that had `digest` before if it ran here before.

    Raises as `Images.ensure`.

    A restart keeps its image, as do further instances of a release that runs here; so does what names a digest, and none of
    these asks a registry. Only a tag that is new with this instance's release is looked up again.
    """
    images = tools.images
    if "@" not in reference and (digest := digest or tools.peer_digest(instance, volume)):
        reference = f"{reference}@{digest}"
    lazily = volume is not None  # what reads a volume waits for what it reads; an app's own image is needed whole
    found = await images.find(reference, lazily=lazily)
    if found is None or "@" in reference:
        return found or await images.ensure(reference, progress=progress, lazily=lazily)
    try:
        async with asyncio.timeout(LOOK_UP_S):
            current = await images.current(reference)
    except (AtollError, TimeoutError) as error:
        why = str(error) or f"no answer within {LOOK_UP_S:g} s"
        message = f"{reference} could not be looked up ({why}); it runs what this node has under that name, {found.digest}"
        log.warning("image not looked up", instance=instance.id, reference=reference, digest=found.digest, error=why)
        tools.reporter.event(instance.project, f"instance/{instance.id}", "image-not-looked-up", message, Severity.WARNING)
        return found
    return await images.ensure(reference, digest=current, progress=progress, lazily=lazily)
