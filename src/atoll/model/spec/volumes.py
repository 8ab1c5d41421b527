"""Directories that an instance sees beside its root."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from msgspec import Meta
from msgspec.structs import force_setattr

from atoll.model.errors import Invalid
from atoll.model.names import Name, SpecRecord
from atoll.model.spec.values import AbsolutePath, check_unique


class Volume(SpecRecord, frozen=True, kw_only=True):
    """A directory of the node, kept across restarts and releases, shared by the app's instances on that node."""

    name: Name
    path: AbsolutePath
    read_only: bool | None = None
    """Where it is left out: false, or with `image` true, and so it is stored."""
    image: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    """Show the files of this image (a model's weights, say), read-only: pulled once per node and shared by all that use it."""

    def __post_init__(self) -> None:
        if self.read_only is None:
            force_setattr(self, "read_only", self.image is not None)


_TARGET_RESERVED = ("/proc", "/sys", "/dev")


def check_volumes(volumes: tuple[Volume, ...]) -> None:
    """Raise Invalid for volumes that cannot be there side by side, naming the field."""
    check_unique([volume.name for volume in volumes], "volumes", "name")
    check_unique([volume.path for volume in volumes], "volumes", "path")
    for index, volume in enumerate(volumes):
        parts = volume.path.split("/")
        if (
            volume.path == "/"
            or ".." in parts
            or any(volume.path == p or volume.path.startswith(p + "/") for p in _TARGET_RESERVED)
        ):
            raise Invalid(f"volumes[{index}].path: cannot mount at {volume.path}", field=f"volumes[{index}].path")
    _check_images(volumes)


def _check_images(volumes: tuple[Volume, ...]) -> None:
    """An image's files cannot be written to, and so nothing can be shown below them either."""
    paths = [PurePosixPath(volume.path) for volume in volumes]
    for index, volume in enumerate(volumes):
        if volume.image is None:
            continue
        if not volume.read_only:
            field = f"volumes[{index}].read_only"
            raise Invalid(f"{field}: the files of an image are always read-only", field=field, mend="leave read_only out")
        for other, path in enumerate(paths):
            if other != index and (path == paths[index] or paths[index] in path.parents):
                field = f"volumes[{other}].path"
                raise Invalid(
                    f"{field}: {volume.path} has the files of the image of volume '{volume.name}', and nothing else can be there",
                    field=field,
                    mend="choose another path",
                )
