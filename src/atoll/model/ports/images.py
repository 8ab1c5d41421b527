"""Images on a node: pulled once by digest, kept by content, shared by all instances."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct


class ImageConfig(Struct, frozen=True, kw_only=True):
    """The parts of an OCI image's config that running it needs."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = "/"
    user: str = ""
    stop_signal: str | None = None
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = {}


class Image(Struct, frozen=True, kw_only=True):
    """An image that is ready on this node."""

    reference: str
    """As asked for."""
    digest: str
    """`sha256:…` of its manifest for this machine."""
    config: ImageConfig
    layers: tuple[Path, ...]
    """Directories of unpacked layers, lowest first, read-only, owned as in the image (root is 0); overlay white-outs are
    already in overlayfs' own form."""
    size_bytes: int = 0


class PullProgress(Struct, frozen=True):
    """`phase` is `resolve`, `download` or `unpack`."""

    phase: str
    done_bytes: int
    total_bytes: int


class ImageTrouble(Struct, frozen=True, kw_only=True):
    """Why pieces of an image that is shown already did not come. It is tried again, at the latest when they are read."""

    reference: str
    digest: str
    message: str


class Images(Protocol):
    async def ensure(
        self,
        reference: str,
        *,
        digest: str | None = None,
        progress: Callable[[PullProgress], None] | None = None,
        lazily: bool = False,
    ) -> Image:
        """Return the image, pulled if it is not here. Concurrent calls for one image share one pull. Safe to repeat.

        With `lazily` it may be returned before its files are here, without layers: only `tree` shows it then, and whoever
        reads there waits for what is read. With `digest`, as `current` gave it, an image that is here under this name counts
        only if it has that digest.

        Raises ImageError: absent, refused, damaged (a wrong digest), for another machine; DeadlineExceeded: the registry
        hangs. What had been fetched and verified is kept, so that a repeat resumes.
        """
        ...

    async def current(self, reference: str) -> str:
        """Return the digest that `reference` has in its registry now, for this machine. The caller sets the deadline.

        Raises ImageError, Unavailable, DeadlineExceeded.
        """
        ...

    async def find(self, reference: str, *, lazily: bool = False) -> Image | None:
        """Return the image if it is ready here, or with `lazily` if it is shown at least; without any network."""
        ...

    def digests(self) -> Sequence[str]:
        """Return the digests by which `find` finds an image here, those of the images handed out last first."""
        ...

    async def tree(self, image: Image) -> Path:
        """Return a directory that holds all files of `image`, for showing them (read-only!) in any number of places.

        It is the same one for all who ask, and is there as long as the image is kept. Its files share disk and page cache
        with the image's layers. Of one that is not here yet (`ensure` with `lazily`) it is a mount, and once all has come another
        directory for those who ask then. Safe to repeat. Raises ImageError, Exhausted, Unavailable.
        """
        ...

    def troubles(self) -> AsyncIterator[ImageTrouble]:
        """Yield, for ever, why pieces of images did not come. There is one reader."""
        ...

    async def collect(self, keep: Sequence[str]) -> int:
        """Remove images whose digest is not in `keep` and that no one holds; return the bytes freed."""
        ...
