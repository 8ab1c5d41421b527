"""The node's images: fetched by digest, unpacked once per layer, shared by all instances. Implements the `Images` port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import structlog
from msgspec import Struct

from atoll.images.disk import Disk, Record, copy_attributes, hex_of
from atoll.images.manifest import ConfigFile, Descriptor, parse_config
from atoll.images.progress import Meter, Progress
from atoll.images.reference import parse
from atoll.images.registry import Registries
from atoll.images.source import Resolved, Source
from atoll.images.threads import in_thread
from atoll.images.unpack import UNPACKED_BYTES_MAX, Unpacked, from_os_error, unpack
from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted
from atoll.model.ports.images import Image
from atoll.model.units import format_bytes

log = structlog.get_logger()

DOWNLOADS_MAX = 4
"""Layers that are fetched at once, of all images together."""
UNPACKS_MAX = 2
"""Layers that are unpacked at once; each takes a core."""
PULL_DEADLINE_S = 3600.0
HOLD_S = 30.0
"""An image that has just been handed out is not collected, so that its user can make itself known."""
FREE_BYTES_MIN = 64 << 20
UNPACK_FACTOR = 3
"""What a compressed layer commonly grows to, for the early check that the disk will hold it."""
REFERENCES_MAX = 256
"""Names that are remembered for one image."""


class _Pull(Struct, eq=False):
    task: asyncio.Task[Image]
    meter: Meter
    waiting: int = 0


class _Ready(Struct, frozen=True):
    """A layer that lies unpacked: under its name, or at `made` until the layers below it are known."""

    name: str
    size_bytes: int
    made: Path | None = None
    implied: tuple[bytes, ...] = ()


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
    ) -> None:
        self._registries = registries
        self._pull_deadline_s = pull_deadline_s
        self._unpacked_bytes_max = unpacked_bytes_max
        self._hold_s = hold_s
        self._monotonic = monotonic
        self._disk = Disk(directory)
        self._records: dict[str, Record] = {}
        self._by_reference: dict[str, Image] = {}
        self._layer_bytes: dict[str, int] = {}
        self._handed_out: dict[str, float] = {}
        self._pulls: dict[str, _Pull] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._busy: Counter[str] = Counter()
        """Layers and blobs that a pull under way relies on; `collect` leaves them."""
        self._downloads = asyncio.Semaphore(DOWNLOADS_MAX)
        self._unpacks = asyncio.Semaphore(UNPACKS_MAX)
        for record in self._disk.recover():
            self._admit(record)

    async def close(self) -> None:
        """End the pulls that are under way; what they have fetched is kept for the next one."""
        tasks = [pull.task for pull in self._pulls.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def find(self, reference: str) -> Image | None:
        image = self._by_reference.get(reference)
        if image is None:
            record = self._records.get(reference.rpartition("@")[2])
            if record is None:
                return None
            image = self._disk.image(record, reference)
        self._handed_out[image.digest] = self._monotonic()
        return image

    async def ensure(self, reference: str, *, progress: Progress | None = None) -> Image:
        image = await self.find(reference)
        if image is not None:
            return image
        return await self._shared(reference, self._registries.source(reference), progress)

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

    async def collect(self, keep: Sequence[str]) -> int:
        now = self._monotonic()
        kept = set(keep) | {digest for digest, at in self._handed_out.items() if now - at < self._hold_s}
        for digest in [digest for digest in self._records if digest not in kept]:
            record = self._records.pop(digest)
            self._disk.forget(record)
            for reference in record.references:
                self._by_reference.pop(reference, None)
            log.info("image removed", digest=digest, references=record.references)
        self._handed_out = {digest: at for digest, at in self._handed_out.items() if digest in self._records}
        layers = {name for record in self._records.values() for name in record.layers}
        self._layer_bytes = {name: size for name, size in self._layer_bytes.items() if name in layers or name in self._busy}
        # what is renamed here, without waiting, no pull can have begun to rely on
        self._disk.move_unused(layers | set(self._busy), set(self._busy))
        return await in_thread(self._disk.empty_trash)

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
        known = self._records.get(resolved.digest)
        if known is not None:
            self._handed_out[known.digest] = self._monotonic()
            return await self._name(known, reference)
        config = await self._config(reference, source, resolved)
        layers, busy = resolved.manifest.layers, _busy_names(resolved, config)
        self._busy.update(busy)
        try:
            self._check_space(resolved, config)
            meter.begin({layer.digest: layer.size for layer in layers})
            ready = await self._layers(source, layers, config.rootfs.diff_ids, meter)
            names = await self._settle(ready)
            record = Record(
                digest=resolved.digest,
                references=(),
                config=config.to_image_config(),
                layers=tuple(names),
                layer_bytes=tuple(layer.size_bytes for layer in ready),
            )
            image = await self._name(self._records.get(record.digest, record), reference)
            self._disk.drop_blobs(layer.digest for layer in layers)
            return image
        finally:
            self._busy -= Counter(busy)

    async def _config(self, reference: str, source: Source, resolved: Resolved) -> ConfigFile:
        path = self._disk.new_path()
        try:
            await source.fetch(resolved.manifest.config, path, lambda _: None)
            data = path.read_bytes()
        finally:
            self._disk.release_path(path)
        return parse_config(data, resolved.manifest, f"image {reference}", architecture=self._registries.architecture)

    def _check_space(self, resolved: Resolved, config: ConfigFile) -> None:
        """Refuse at once what the disk clearly cannot hold."""
        missing = {
            layer.digest: layer.size
            for layer, diff_id in zip(resolved.manifest.layers, config.rootfs.diff_ids, strict=True)
            if hex_of(diff_id) not in self._layer_bytes
        }
        needed = sum(missing.values()) * (1 + UNPACK_FACTOR) + FREE_BYTES_MIN
        free = self._disk.free_bytes()
        if missing and needed > free:
            raise Exhausted(
                f"the image needs about {format_bytes(needed)} in {self._disk.directory}, and {format_bytes(free)} are free",
                mend="free some space, or put the data directory on a larger disk",
            )

    async def _layers(self, source: Source, layers: Sequence[Descriptor], diff_ids: Sequence[str], meter: Meter) -> list[_Ready]:
        chains = chain_ids(diff_ids)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._layer(source, descriptor, diff_id, chain, meter))
                    for descriptor, diff_id, chain in zip(layers, diff_ids, chains, strict=True)
                ]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            if any(task.cancelled() or task.exception() for task in tasks):
                self._release(task.result() for task in tasks if not task.cancelled() and not task.exception())
        return [task.result() for task in tasks]

    async def _layer(self, source: Source, descriptor: Descriptor, diff_id: str, chain: str, meter: Meter) -> _Ready:
        """Return the layer, fetched and unpacked unless it lies here. One at a time per diff id, whoever asks."""
        lock = self._locks.setdefault(diff_id, asyncio.Lock())
        async with lock:
            for name in (hex_of(diff_id), chain):
                size = self._layer_bytes.get(name)
                if size is not None:
                    meter.skip(descriptor.digest)
                    return _Ready(name, size)
            blob = self._disk.blob(descriptor.digest)
            if not blob.exists():
                async with self._downloads:
                    partial = self._disk.partial(descriptor.digest)
                    try:
                        await source.fetch(descriptor, partial, functools.partial(meter.fetched, descriptor.digest))
                    except OSError:
                        partial.unlink(missing_ok=True)
                        raise
                    partial.rename(blob)
            meter.fetched(descriptor.digest, descriptor.size)
            async with self._unpacks:
                return await self._unpack(blob, descriptor, diff_id, chain, meter)

    async def _unpack(self, blob: Path, descriptor: Descriptor, diff_id: str, chain: str, meter: Meter) -> _Ready:
        made = self._disk.new_path()
        stop = threading.Event()
        on_bytes = meter.from_thread(descriptor.digest)
        try:
            found: Unpacked = await in_thread(
                lambda: unpack(blob, made, diff_id=diff_id, bytes_max=self._unpacked_bytes_max, on_bytes=on_bytes, stop=stop),
                stop=stop,
            )
        except BaseException as error:
            self._disk.release_path(made)
            if isinstance(error, AtollError) and not isinstance(error, DeadlineExceeded):
                self._disk.drop_blobs([descriptor.digest])
            raise
        if found.implied and chain != hex_of(diff_id):
            return _Ready(chain, found.size_bytes, made, found.implied)
        self._disk.keep_layer(made, hex_of(diff_id))
        self._disk.release_path(made)
        self._layer_bytes[hex_of(diff_id)] = found.size_bytes
        return _Ready(hex_of(diff_id), found.size_bytes)

    async def _settle(self, ready: Sequence[_Ready]) -> list[str]:
        """Return the layers' names, after those that depend on the layers below have taken what they need from them."""
        names: list[str] = []
        try:
            for layer in ready:
                if layer.made is not None:
                    lower = [self._disk.layer(name) for name in names]
                    await in_thread(functools.partial(copy_attributes, layer.made, layer.implied, lower))
                    self._disk.keep_layer(layer.made, layer.name)
                    self._layer_bytes[layer.name] = layer.size_bytes
                names.append(layer.name)
        finally:
            self._release(ready)
        return names

    def _release(self, layers: Iterable[_Ready]) -> None:
        for layer in layers:
            if layer.made is not None:
                self._disk.release_path(layer.made)

    async def _name(self, record: Record, reference: str) -> Image:
        """Write the record with one more reference and take that away from any other image."""
        references = (*(name for name in record.references if name != reference), reference)[-REFERENCES_MAX:]
        named = Record(
            digest=record.digest,
            references=references,
            config=record.config,
            layers=record.layers,
            layer_bytes=record.layer_bytes,
        )
        await in_thread(lambda: self._disk.write_record(named))
        self._admit(named)
        self._handed_out[named.digest] = self._monotonic()
        return self._by_reference[reference]

    def _admit(self, record: Record) -> None:
        self._records[record.digest] = record
        self._layer_bytes.update(zip(record.layers, record.layer_bytes, strict=True))
        for reference in record.references:
            self._by_reference[reference] = self._disk.image(record, reference)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return each layer's chain id by the OCI image specification, as a directory name: `c-HEX`, the first plain `HEX`."""
    names: list[str] = []
    chain = ""
    for diff_id in diff_ids:
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
        names.append(f"c-{hex_of(chain)}" if names else hex_of(chain))
    return names


def _busy_names(resolved: Resolved, config: ConfigFile) -> list[str]:
    diff_ids = config.rootfs.diff_ids
    return [*{hex_of(diff_id) for diff_id in diff_ids}, *chain_ids(diff_ids), *{layer.digest for layer in resolved.manifest.layers}]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to report: ours before others."""
    ours, _ = errors.split(AtollError)
    error: BaseException = ours or errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
