"""The node's images: fetched by digest, unpacked once per layer, shared by all instances. Implements the `Images` port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import structlog
from msgspec import Struct

from atoll.images.disk import Disk, Record, hex_of
from atoll.images.layers import Layers, layer_names
from atoll.images.lazy.record import LazyImage
from atoll.images.lazy.shown import LazyImages
from atoll.images.manifest import ConfigFile, parse_config
from atoll.images.merged import merge
from atoll.images.progress import Meter, Progress
from atoll.images.reference import parse
from atoll.images.registry import Registries, RegistryImage
from atoll.images.source import Resolved, Source
from atoll.images.threads import in_thread
from atoll.images.unpack import UNPACKED_BYTES_MAX, from_os_error
from atoll.model.errors import DeadlineExceeded
from atoll.model.ports.images import Image, ImageTrouble

log = structlog.get_logger()

PULL_DEADLINE_S = 3600.0
HOLD_S = 30.0
"""An image that has just been handed out is not collected, so that its user can make itself known."""
REFERENCES_MAX = 256
"""Names that are remembered for one image."""


class _Pull(Struct, eq=False):
    task: asyncio.Task[Image]
    meter: Meter
    waiting: int = 0


class ImageStore:
    """Images in `directory`, from `registries`. Only one process may use a directory at a time.

    The constructor removes what an earlier process left half-made; `close` ends the pulls that are under way.
    """

    def __init__(
        self,
        directory: Path,
        registries: Registries,
        *,
        pull_deadline_s: float = PULL_DEADLINE_S,
        unpacked_bytes_max: int = UNPACKED_BYTES_MAX,
        hold_s: float = HOLD_S,
        monotonic: Callable[[], float] = time.monotonic,
        lazy: LazyImages | None = None,
    ) -> None:
        self._lazy = lazy
        self._watching: asyncio.Task[None] | None = None
        self._registries = registries
        self._pull_deadline_s = pull_deadline_s
        self._hold_s = hold_s
        self._monotonic = monotonic
        self._disk = Disk(directory)
        self._records: dict[str, Record] = {}
        self._by_reference: dict[str, Image] = {}
        self._layers = Layers(self._disk, unpacked_bytes_max=unpacked_bytes_max)
        self._handed_out: dict[str, float] = {}
        self._pulls: dict[str, _Pull] = {}
        self._showing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._trees: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._naming = asyncio.Lock()
        for record in self._disk.recover():
            self._admit(record)

    async def close(self) -> None:
        """End the pulls that are under way; what they have fetched is kept for the next one."""
        tasks: list[asyncio.Task[Any]] = [pull.task for pull in self._pulls.values()]
        if self._watching is not None:
            tasks.append(self._watching)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def find(self, reference: str, *, lazily: bool = False) -> Image | None:
        self._begin()
        image = self._by_reference.get(reference)
        if image is None:
            record = self._records.get(reference.rpartition("@")[2])
            if record is None:
                shown = self._lazy.find(reference) if lazily and self._lazy is not None else None
                if shown is not None:
                    self._handed_out[shown.digest] = self._monotonic()
                return shown
            image = self._disk.image(record, reference)
        self._handed_out[image.digest] = self._monotonic()
        return image

    def digests(self) -> Sequence[str]:
        records = sorted(self._records.values(), key=lambda record: self._handed_out.get(record.digest, 0.0), reverse=True)
        # An index has a digest of its own, by which the image may have been asked for.
        return tuple(
            dict.fromkeys(
                digest
                for record in records
                for digest in (record.digest, *(name.rpartition("@")[2] for name in record.references if "@" in name))
            )
        )

    async def current(self, reference: str) -> str:
        return (await self._registries.source(reference).resolve()).digest

    async def ensure(
        self, reference: str, *, digest: str | None = None, progress: Progress | None = None, lazily: bool = False
    ) -> Image:
        image = await self.find(reference, lazily=lazily)
        if image is not None and digest in (None, image.digest):
            return image
        if digest is not None and (known := self._records.get(digest)) is not None:
            return await self._name(known, reference)
        source = self._registries.source(reference)
        if lazily and self._lazy is not None and (shown := await self._show(reference, source)) is not None:
            return shown
        return await self._shared(reference, source, progress)

    async def add(self, reference: str, source: Source, *, progress: Progress | None = None) -> Image:
        """Take the image from `source` (an archive) under the name `reference`, in place of one that has it."""
        parse(reference, default_registry=self._registries.default)
        return await self._shared(reference, source, progress)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """Give a path on the store's disk where the caller may make a directory; it is gone afterwards."""
        path = self._disk.new_path()
        try:
            yield path
        finally:
            self._disk.release_path(path)

    async def tree(self, image: Image) -> Path:
        if self._lazy is not None and image.digest not in self._records and image.digest in self._lazy.digests:
            return await self._lazy.tree(image.digest)
        record = self._records.get(image.digest)
        if record is not None and not image.layers:  # all of it has come since it was asked for
            image = self._disk.image(record, image.reference)
        if len(image.layers) == 1:
            return image.layers[0]
        path = self._disk.tree(image.digest)
        async with self._trees.setdefault(image.digest, asyncio.Lock()):
            if not path.exists():
                with self._layers.relied_on([image.digest, *(layer.name for layer in image.layers)]):
                    try:
                        await in_thread(lambda: self._disk.make_tree(image.layers, image.digest))
                    except OSError as error:
                        raise from_os_error(error, f"cannot show the files of image {image.reference}") from None
        return path

    async def collect(self, keep: Sequence[str]) -> int:
        wanted = frozenset(keep)

        def is_kept(digest: str) -> bool:
            at = self._handed_out.get(digest)
            return digest in wanted or digest in self._layers.busy or (at is not None and self._monotonic() - at < self._hold_s)

        for digest in [digest for digest in self._records if not is_kept(digest)]:
            record = self._records.pop(digest)
            self._disk.forget(record)
            for reference in record.references:
                self._by_reference.pop(reference, None)
            log.info("image removed", digest=digest, references=record.references)
        if self._lazy is not None:
            await self._lazy.collect(is_kept)
        shown = self._lazy.digests if self._lazy is not None else ()
        self._handed_out = {digest: at for digest, at in self._handed_out.items() if digest in self._records or digest in shown}
        layers = {name for record in self._records.values() for name in record.layers}
        self._layers.forget_others(layers)
        # what is renamed here, without waiting, no pull can have begun to rely on
        self._disk.move_unused(layers | self._layers.busy, self._layers.busy)
        self._disk.move_trees(self._records)
        return await in_thread(self._disk.empty_trash)

    async def troubles(self) -> AsyncIterator[ImageTrouble]:
        self._begin()
        if self._lazy is None:
            await asyncio.Event().wait()
            return
        async for trouble in self._lazy.troubles():
            yield trouble

    def _begin(self) -> None:
        if self._lazy is not None and self._watching is None:
            self._watching = asyncio.create_task(self._lazy.watch(self._records.__contains__, self._take))

    async def _show(self, reference: str, source: RegistryImage) -> Image | None:
        """Return the image, shown before it is here; None if it must be fetched whole, or is here."""
        if self._lazy is None:
            return None
        async with self._showing.setdefault(reference, asyncio.Lock()):
            resolved = await source.resolve()
            if resolved.digest in self._records:
                return None
            config = await self._config(reference, source, resolved)
            shown = await self._lazy.show(reference, source, resolved, config)
        if shown is not None:
            self._handed_out[shown.digest] = self._monotonic()
        return shown

    async def _take(self, image: LazyImage, tree: Path) -> None:
        """Take over an image all of whose files have come: they stay where they are, and are layers too."""
        name = hex_of(image.diff_id)
        with self._layers.relied_on([image.digest, name]):
            if not self._disk.layer(name).exists():
                made = self._disk.new_path()
                try:
                    await in_thread(lambda: merge([tree], made))
                    self._disk.keep_layer(made, name)
                finally:
                    self._disk.release_path(made)
            record = Record(
                digest=image.digest, references=(), config=image.config, layers=(name,), layer_bytes=(image.plain_bytes,)
            )
            for reference in image.references:
                await self._name(record, reference)
        log.info("image ready", reference=image.references[-1], digest=image.digest, bytes=image.plain_bytes, lazily=True)

    async def _shared(self, reference: str, source: Source, progress: Progress | None) -> Image:
        """Wait for the one pull of `reference`; it ends when nobody waits for it any more."""
        pull = self._pulls.get(reference)
        if pull is None:
            meter = Meter()
            pull = self._pulls[reference] = _Pull(asyncio.create_task(self._pull(reference, source, meter)), meter)
            pull.task.add_done_callback(functools.partial(self._pulled, reference, pull))
        pull.waiting += 1
        try:
            with pull.meter.listened_by(progress):
                return await asyncio.shield(pull.task)
        finally:
            pull.waiting -= 1
            if pull.waiting == 0 and not pull.task.done():
                self._leave(reference, pull)
                pull.task.cancel()

    def _leave(self, reference: str, pull: _Pull) -> None:
        if self._pulls.get(reference) is pull:
            del self._pulls[reference]

    def _pulled(self, reference: str, pull: _Pull, task: asyncio.Task[Image]) -> None:
        self._leave(reference, pull)
        if not task.cancelled():
            task.exception()  # read here, so that one that nobody waits for any more does not warn

    async def _pull(self, reference: str, source: Source, meter: Meter) -> Image:
        started = self._monotonic()
        try:
            async with asyncio.timeout(self._pull_deadline_s):
                image = await self._fetch_image(reference, source, meter)
        except TimeoutError:
            raise DeadlineExceeded(
                f"pulling {reference} took more than {self._pull_deadline_s:.0f} s", mend="try again: it continues where it stopped"
            ) from None
        except OSError as error:
            raise from_os_error(error, f"cannot store image {reference}") from None
        log.info(
            "image ready",
            reference=reference,
            digest=image.digest,
            bytes=image.size_bytes,
            took_s=round(self._monotonic() - started, 3),
        )
        return image

    async def _fetch_image(self, reference: str, source: Source, meter: Meter) -> Image:
        resolved = await source.resolve()
        if self._lazy is not None:
            await self._lazy.come(resolved.digest, self._records.__contains__, meter)
        with self._layers.relied_on([resolved.digest]):
            known = self._records.get(resolved.digest)
            if known is not None:
                return await self._name(known, reference)
            config = await self._config(reference, source, resolved)
            with self._layers.relied_on(layer_names(resolved, config)):
                layers = await self._layers.make(source, resolved, config, meter)
                record = Record(
                    digest=resolved.digest,
                    references=(),
                    config=config.to_image_config(),
                    layers=tuple(layer.name for layer in layers),
                    layer_bytes=tuple(layer.size_bytes for layer in layers),
                )
                image = await self._name(record, reference)
                self._disk.drop_blobs(layer.digest for layer in resolved.manifest.layers)
                return image

    async def _config(self, reference: str, source: Source, resolved: Resolved) -> ConfigFile:
        with self.workplace() as path:
            await source.fetch(resolved.manifest.config, path, lambda _: None)
            data = path.read_bytes()
        return parse_config(data, resolved.manifest, f"image {reference}", architecture=self._registries.architecture)

    async def _name(self, record: Record, reference: str) -> Image:
        """Write the image's record (`record` where it has none) with one more reference, and take that from the image that had it.

        One at a time: a record that is read here must be the one that is replaced. Neither image is collected meanwhile.
        """
        with self._layers.relied_on([record.digest]):
            async with self._naming:
                record = self._records.get(record.digest, record)
                references = (*(name for name in record.references if name != reference), reference)[-REFERENCES_MAX:]
                before = self._by_reference.get(reference)
                await self._write(msgspec.structs.replace(record, references=references))
                if before is not None and before.digest != record.digest:
                    await self._unname(before.digest, reference)
            self._handed_out[record.digest] = self._monotonic()
            return self._by_reference[reference]

    async def _unname(self, digest: str, reference: str) -> None:
        with self._layers.relied_on([digest]):
            if (record := self._records.get(digest)) is not None:
                references = tuple(name for name in record.references if name != reference)
                await self._write(msgspec.structs.replace(record, references=references))

    async def _write(self, record: Record) -> None:
        await in_thread(lambda: self._disk.write_record(record))
        self._admit(record)

    def _admit(self, record: Record) -> None:
        self._records[record.digest] = record
        self._layers.know(record)
        for reference in record.references:
            self._by_reference[reference] = self._disk.image(record, reference)
