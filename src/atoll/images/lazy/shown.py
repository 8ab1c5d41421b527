"""The agent's side of images that are shown before they are here: it describes them, and takes them over when all has come."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import msgspec
import structlog
from msgspec.structs import replace

from atoll.images.auth import Access
from atoll.images.chunks import ANNOTATION, PLAIN_BYTES_MAX, Place, Table, parse_place, parse_table
from atoll.images.lazy.mount import LazyMount
from atoll.images.lazy.record import (
    ALL,
    ENTRIES_SHOWN_MAX,
    HAVE,
    IMAGE_JSON,
    REST,
    TREE,
    TROUBLE,
    LazyImage,
    LazyPaths,
    Trouble,
    boot_id,
    read_image,
    write_whole,
)
from atoll.images.lazy.skeleton import make_skeleton
from atoll.images.manifest import ConfigFile
from atoll.images.progress import Meter
from atoll.images.registry import RegistryImage
from atoll.images.source import Resolved
from atoll.images.threads import in_thread
from atoll.model.errors import AtollError, ImageError, Unsupported
from atoll.model.ports.images import Image, ImageTrouble

SHOWN_BYTES_MIN = 128 << 20
"""A smaller image is here as soon as it could be shown."""
LOOK_S = 0.5
TROUBLES_MAX = 64
READ_BYTES = 1 << 20

log = structlog.get_logger()


class Taker(Protocol):
    async def __call__(self, image: LazyImage, tree: Path, /) -> None:
        """Take the files below `tree`, which are all here and verified, as those of the image. Raises AtollError, OSError."""
        ...


class LazyImages:
    """Images below `directory` (which only one agent uses). `access` is how registries are reached, as for `Registries`."""

    def __init__(
        self, directory: Path, access: dict[str, Access], *, bytes_min: int = SHOWN_BYTES_MIN, mount: LazyMount | None = None
    ) -> None:
        self.paths = LazyPaths(directory)
        self._mount = mount or LazyMount(self.paths, access)
        self._bytes_min = bytes_min
        self._boot = boot_id()
        self._images: dict[str, LazyImage] = {}
        self._changing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by digest: who lays out or removes
        self._counter = 0
        self._told: dict[str, Trouble] = {}
        self._wrong: set[str] = set()
        self._troubles: asyncio.Queue[ImageTrouble] = asyncio.Queue(TROUBLES_MAX)
        self._recover()

    # what there is

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._images)

    def find(self, reference: str) -> Image | None:
        """Return the image that is shown under this name, or by its digest."""
        digest = reference.rpartition("@")[2]
        found = [image for image in self._images.values() if image.digest == digest or reference in image.references]
        # A tag that was pushed again names the image that was shown last.
        return _as_image(max(found, key=lambda image: image.number), reference) if found else None

    async def tree(self, digest: str) -> Path:
        """Return where its files are shown, with somebody there to show them. Raises Unavailable, Unsupported."""
        await self._mount.keep()
        return self.paths.shown(digest)

    async def troubles(self) -> AsyncIterator[ImageTrouble]:
        """Yield, for ever, why pieces did not come: the first time, and when the reason changes."""
        while True:
            yield await self._troubles.get()

    # showing

    async def show(self, reference: str, source: RegistryImage, resolved: Resolved, config: ConfigFile) -> Image | None:
        """Show the image, if it is one that can be; None if it must be fetched whole. Safe to repeat.

        Raises AtollError: it could have been shown, and its registry or this machine failed.
        """
        # Two references may name one image: what the first shows must not be laid out again below those who start from it.
        async with self._changing.setdefault(resolved.digest, asyncio.Lock()):
            if (known := self._images.get(resolved.digest)) is not None:
                return self._name(known, reference)
            return await self._show(reference, source, resolved, config)

    async def _show(self, reference: str, source: RegistryImage, resolved: Resolved, config: ConfigFile) -> Image | None:
        place = self._suitable(resolved)
        if place is None:
            return None
        layer = resolved.manifest.layers[0]
        serving = asyncio.create_task(self._mount.keep())  # beside it: a new process takes a while
        try:
            payload = bytearray()
            async with contextlib.aclosing(source.read_range(layer, place.offset, place.offset + place.size)) as parts:
                async for part in parts:
                    payload += part
            table = await in_thread(lambda: parse_table(bytes(payload), place))
            described = LazyImage(
                number=self._counter + 1,
                boot=self._boot,
                digest=resolved.digest,
                references=(reference,),
                source=source.pinned(resolved.digest),
                config=config.to_image_config(),
                layer=layer,
                diff_id=config.rootfs.diff_ids[0],
                chunk_bytes=table.chunk_bytes,
                plain_bytes=table.plain_bytes,
                packed=table.packed,
                digests=table.digests,
                content=table.content,
                entries=(),
            )
            self._counter += 1
            self.paths.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self.paths.directory / "counter", str(self._counter).encode())
            image = await in_thread(functools.partial(self._describe, described, table))
        except (Unsupported, ImageError) as error:
            log.info("an image is fetched whole", reference=reference, why=str(error))
            return None
        finally:
            await asyncio.wait([serving])
        await serving
        self._images[image.digest] = image
        log.info("an image is shown before it is here", reference=reference, digest=image.digest, bytes=image.plain_bytes)
        return _as_image(image, reference)

    def _suitable(self, resolved: Resolved) -> Place | None:
        layers = resolved.manifest.layers
        if self._mount.refusal or len(layers) != 1 or layers[0].size < self._bytes_min:
            return None
        return parse_place(layers[0].annotations.get(ANNOTATION, ""), layers[0].size)

    def _describe(self, image: LazyImage, table: Table) -> LazyImage:
        """Lay the image out on disk. Blocks."""
        self.paths.images.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self.paths.image(image.digest)
        shutil.rmtree(target, ignore_errors=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=self.paths.images))
        try:
            free = os.statvfs(made)
            if table.plain_bytes > min(PLAIN_BYTES_MAX, free.f_bavail * free.f_frsize):
                raise ImageError(f"{table.plain_bytes} bytes do not fit")
            entries = make_skeleton(table, made / TREE)
            if len(entries) > ENTRIES_SHOWN_MAX:
                raise ImageError(f"it has more than {ENTRIES_SHOWN_MAX} files")
            if {entry.offset for entry in entries if entry.offset} != {offset for offset, _ in table.content}:
                raise ImageError("it has a file that another of the same name replaces")
            image = replace(image, entries=tuple(entries))
            (made / REST).write_bytes(table.rest)
            (made / HAVE).touch(mode=0o600)
            write_whole(made / IMAGE_JSON, msgspec.json.encode(image))
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return image

    def _name(self, image: LazyImage, reference: str) -> Image:
        if reference not in image.references:
            image = replace(image, references=(*image.references, reference)[-64:])
            write_whole(self.paths.image(image.digest) / IMAGE_JSON, msgspec.json.encode(image))
            self._images[image.digest] = image
        return _as_image(image, reference)

    # taking over

    async def watch(self, is_here: Callable[[str], bool], taken: Taker) -> None:
        """Give images that are whole, and are not here by digest, to `taken`, and tell of troubles; for ever."""
        while True:
            for image in list(self._images.values()):
                if not is_here(image.digest):
                    await self._look_at(image, taken)
            await asyncio.sleep(LOOK_S)

    async def _look_at(self, image: LazyImage, taken: Taker) -> None:
        directory = self.paths.image(image.digest)
        try:
            trouble = msgspec.json.decode((directory / TROUBLE).read_bytes(), type=Trouble)
        except (OSError, msgspec.DecodeError):
            trouble = Trouble("", 0)
        before = self._told.get(image.digest, Trouble("", 0))
        self._told[image.digest] = trouble
        if trouble.message and trouble.message != before.message:
            self._tell(image, trouble.message)
        if image.digest in self._wrong or not (directory / ALL).exists():
            return
        try:
            found = await in_thread(lambda: _diff_id(directory, image))
            if found != image.diff_id:
                raise ImageError(f"all of it has come, and its layer has digest {found}, not {image.diff_id}")
            await taken(image, directory / TREE)
        except (AtollError, OSError) as error:
            self._wrong.add(image.digest)
            self._tell(image, str(error))

    def _tell(self, image: LazyImage, message: str) -> None:
        log.warning("an image is not all here", digest=image.digest, why=message)
        with contextlib.suppress(asyncio.QueueFull):
            self._troubles.put_nowait(ImageTrouble(reference=image.references[-1], digest=image.digest, message=message))

    async def come(self, digest: str, is_here: Callable[[str], bool], meter: Meter) -> None:
        """Wait for an image that is shown to be here. Returns at once for others, and as soon as pieces of it do not come."""
        image = self._images.get(digest)
        if image is None or is_here(digest):
            return
        meter.begin({digest: image.plain_bytes})
        while digest in self._images and digest not in self._wrong and not is_here(digest):
            if self._told.get(digest, Trouble("", 0)).count:
                return
            with contextlib.suppress(OSError):
                have = (self.paths.image(digest) / HAVE).read_bytes()
                meter.fetched(digest, image.plain_bytes * have.count(1) // len(image.packed))
            await asyncio.sleep(LOOK_S)

    # removal

    async def collect(self, is_kept: Callable[[str], bool]) -> None:
        """Forget and remove images but those whose digests are kept; without any left the mount goes too."""
        for digest in list(self._images):
            async with self._changing.setdefault(digest, asyncio.Lock()):
                if is_kept(digest):  # asked only now: it may have been handed out meanwhile
                    continue
                image = self._images.pop(digest)
                self._told.pop(digest, None)
                self._wrong.discard(digest)
                await in_thread(functools.partial(shutil.rmtree, self.paths.image(digest), ignore_errors=True))
            log.info("an image is not shown any more", digest=digest, references=image.references)
        if not self._images:
            self._mount.end()

    def end(self) -> None:
        """Take the mount away: what still shows it keeps it, nobody else gets it. The process ends with the last of them."""
        self._mount.end()

    def _recover(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._counter = int((self.paths.directory / "counter").read_bytes())
        if not self.paths.images.is_dir():
            return
        for directory in sorted(self.paths.images.iterdir()):
            try:
                image = read_image(directory)
                # What is in the tree is sure to be on the disk only as long as the machine runs, and so is the mount.
                if image.boot == self._boot and directory == self.paths.image(image.digest):
                    self._images[image.digest] = image
                    continue
            except (OSError, msgspec.DecodeError) as error:
                log.warning("an image that was shown is dropped", directory=str(directory), why=str(error))
            shutil.rmtree(directory, ignore_errors=True)


def _as_image(image: LazyImage, reference: str) -> Image:
    return Image(reference=reference, digest=image.digest, config=image.config, layers=(), size_bytes=image.plain_bytes)


def _diff_id(directory: Path, image: LazyImage) -> str:
    """Return the digest of the tar that the tree and the rest make up. Blocks for long."""
    digest = hashlib.sha256()
    paths: dict[int, Path] = {}
    known = [directory / TREE]
    for entry in image.entries[1:]:
        known.append(known[entry.parent] / entry.name)
        if entry.offset:
            paths[entry.offset] = known[-1]
    with (directory / REST).open("rb") as rest:
        at = 0
        for offset, size in (*image.content, (image.plain_bytes, 0)):
            digest.update(rest.read(offset - at))
            if size:
                with paths[offset].open("rb") as file:
                    while data := file.read(READ_BYTES):
                        digest.update(data)
            at = offset + size
    return f"sha256:{digest.hexdigest()}"
