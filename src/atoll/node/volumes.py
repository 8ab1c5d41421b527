"""Volumes that show the files of an image: pulled like any image, and one directory for all instances on the node that ask.

Which image each of them is follows the same rules as the app's own (`image_choice`): a restart keeps what it had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from atoll.model.errors import AtollError
from atoll.model.ports.images import PullProgress
from atoll.model.records import Assignment
from atoll.model.spec import Volume
from atoll.node.image_choice import choose_image
from atoll.node.tools import Tools


async def show_images(
    tools: Tools, assignment: Assignment, digests: dict[str, str], progress: Callable[[PullProgress], None]
) -> Mapping[str, Path]:
    """Return the directory that each volume with an image shows, by the volume's name; what is not here is pulled.

    `digests` (volume → digest) is what the instance had before; each image is added as soon as it is chosen, so that it is kept
    from then on. Raises as `Images.ensure`, naming the field, in an exception group.
    """
    wanted = [(index, volume) for index, volume in enumerate(assignment.workload.volumes) if volume.image is not None]
    if not wanted:
        return {}
    async with asyncio.TaskGroup() as group:
        shown = {
            volume.name: group.create_task(_show(tools, assignment, index, volume, digests, progress)) for index, volume in wanted
        }
    return {name: task.result() for name, task in shown.items()}


async def _show(
    tools: Tools,
    assignment: Assignment,
    index: int,
    volume: Volume,
    digests: dict[str, str],
    progress: Callable[[PullProgress], None],
) -> Path:
    try:
        known = digests.get(volume.name)
        image = await choose_image(tools, assignment.instance, volume.image or "", known, progress, volume=volume.name)
        digests[volume.name] = image.digest
        return await tools.images.tree(image)
    except AtollError as error:
        field = f"volumes[{index}].image"
        raise type(error)(f"{field}: {error}", mend=error.mend, field=field) from None
