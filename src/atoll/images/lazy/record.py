"""How an image that is shown before it is here lies on disk, for the agent that describes it and the process that fills it.

```
lazy/lock         held by whoever keeps the mount alive
     access.json  how registries are reached (0600)
     mnt/         the mount: HEX/ for each image
     images/HEX/  image.json  what it is and where it comes from; written last
                  rest        the tar without the contents
                  tree/       the files, sparse where nothing has come yet
                  have        one byte for each piece: 1 when it is in the tree, verified
                  all         there when every piece has come
                  trouble     why the last try to fetch failed
```
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from atoll.images.auth import Access
from atoll.images.chunks import Table
from atoll.images.lazy.skeleton import ShownEntry
from atoll.images.manifest import Descriptor
from atoll.model.ports.images import ImageConfig

IMAGE_JSON, REST, TREE, HAVE, ALL, TROUBLE = "image.json", "rest", "tree", "have", "all", "trouble"
ENTRIES_SHOWN_MAX = 200_000
"""Entries of one image; one with more is fetched whole."""
IMAGE_JSON_BYTES_MAX = 128 << 20


class LazyImage(Struct, frozen=True, kw_only=True):
    """One image that is shown before it is here. `number` is its alone as long as the mount lives."""

    number: int
    boot: str
    digest: str
    references: tuple[str, ...]
    source: str
    """HOST/NAME@DIGEST: where its pieces come from."""
    config: ImageConfig
    layer: Descriptor
    diff_id: str
    chunk_bytes: int
    plain_bytes: int
    packed: tuple[int, ...]
    digests: bytes
    content: tuple[tuple[int, int], ...]
    entries: tuple[ShownEntry, ...]

    @property
    def table(self) -> Table:
        """As it came, but for the rest, which is a file of its own."""
        return Table(
            chunk_bytes=self.chunk_bytes,
            plain_bytes=self.plain_bytes,
            packed=self.packed,
            digests=self.digests,
            content=self.content,
            rest=b"",
        )


class Trouble(Struct, frozen=True):
    """Why pieces of an image did not come: in words, and how often since they last did."""

    message: str
    count: int


class LazyPaths:
    """The paths below one node's `lazy/`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lock = directory / "lock"
        self.log = directory / "log"
        self.access = directory / "access.json"
        self.mount = directory / "mnt"
        self.images = directory / "images"

    def image(self, digest: str) -> Path:
        return self.images / digest.removeprefix("sha256:")

    def shown(self, digest: str) -> Path:
        return self.mount / digest.removeprefix("sha256:")

    def is_mounted(self) -> bool:
        """Whether something is mounted in its place, as this process sees it."""
        at = os.fsencode(self.mount).replace(b" ", b"\\040")
        return any(line.split()[4] == at for line in Path("/proc/self/mountinfo").read_bytes().splitlines())

    def read_access(self) -> dict[str, Access]:
        return msgspec.json.decode(self.access.read_bytes(), type=dict[str, Access])


def read_image(directory: Path) -> LazyImage:
    """Raises OSError, msgspec.DecodeError."""
    return msgspec.json.decode((directory / IMAGE_JSON).read_bytes(), type=LazyImage)


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make the file appear with all of its content, in place of one that is there."""
    made = path.with_name(f".{path.name}.new")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    made.rename(path)


def boot_id() -> str:
    """Return what tells one start of this machine from the next."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
