"""An image's layers on this node: each is fetched once and unpacked once, whoever needs it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from weakref import WeakValueDictionary

from msgspec import Struct

from atoll.images.disk import Disk, Record, copy_attributes, hex_of
from atoll.images.manifest import ConfigFile, Descriptor
from atoll.images.progress import Meter
from atoll.images.source import Resolved, Source
from atoll.images.threads import in_thread
from atoll.images.unpack import Unpacked, unpack
from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted
from atoll.model.units import format_bytes

DOWNLOADS_MAX = 4
"""Layers that are fetched at once, of all images together."""
UNPACKS_MAX = 2
"""Layers that are unpacked at once; each takes a core."""
FREE_BYTES_MIN = 64 << 20
UNPACK_FACTOR = 3
"""What a compressed layer commonly grows to, for the early check that the disk will hold it."""


class ReadyLayer(Struct, frozen=True):
    """A layer that lies unpacked: under its name, or at `made` until the layers below it are known."""

    name: str
    size_bytes: int
    made: Path | None = None
    implied: tuple[bytes, ...] = ()


class Layers:
    """Fetches and unpacks layers to `disk`, and knows which lie there."""

    def __init__(self, disk: Disk, *, unpacked_bytes_max: int, unpacker: Callable[..., Unpacked] = unpack) -> None:
        self._disk = disk
        self._unpacker = unpacker
        self._unpacked_bytes_max = unpacked_bytes_max
        self._bytes: dict[str, int] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._busy: Counter[str] = Counter()
        self._downloads = asyncio.Semaphore(DOWNLOADS_MAX)
        self._unpacks = asyncio.Semaphore(UNPACKS_MAX)

    @property
    def busy(self) -> AbstractSet[str]:
        """Images, layers and blobs that a pull under way relies on."""
        return self._busy.keys()

    def know(self, record: Record) -> None:
        self._bytes.update(zip(record.layers, record.layer_bytes, strict=True))

    def forget_others(self, names: AbstractSet[str]) -> None:
        """Forget all layers but `names` and those that are busy."""
        self._bytes = {name: size for name, size in self._bytes.items() if name in names or name in self._busy}

    @contextlib.contextmanager
    def relied_on(self, names: Sequence[str]) -> Iterator[None]:
        self._busy.update(names)
        try:
            yield
        finally:
            self._busy -= Counter(names)

    async def make(self, source: Source, resolved: Resolved, config: ConfigFile, meter: Meter) -> list[ReadyLayer]:
        """Return the image's layers, lowest first, all in their places; the caller relies on `layer_names`."""
        self._check_space(resolved, config)
        meter.begin({layer.digest: layer.size for layer in resolved.manifest.layers})
        ready = await self._all(source, resolved.manifest.layers, config.rootfs.diff_ids, meter)
        await self._settle(ready)
        return ready

    def _check_space(self, resolved: Resolved, config: ConfigFile) -> None:
        """Refuse at once what the disk clearly cannot hold."""
        missing = {
            layer.digest: layer.size
            for layer, diff_id in zip(resolved.manifest.layers, config.rootfs.diff_ids, strict=True)
            if hex_of(diff_id) not in self._bytes
        }
        needed = sum(missing.values()) * (1 + UNPACK_FACTOR) + FREE_BYTES_MIN
        free = self._disk.free_bytes()
        if missing and needed > free:
            raise Exhausted(
                f"the image needs about {format_bytes(needed)} in {self._disk.directory}, and {format_bytes(free)} are free",
                mend="free some space, or put the data directory on a larger disk",
            )

    async def _all(self, source: Source, layers: Sequence[Descriptor], diff_ids: Sequence[str], meter: Meter) -> list[ReadyLayer]:
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

    async def _layer(self, source: Source, descriptor: Descriptor, diff_id: str, chain: str, meter: Meter) -> ReadyLayer:
        """Return the layer, fetched and unpacked unless it lies here. One at a time per diff id, whoever asks."""
        lock = self._locks.setdefault(diff_id, asyncio.Lock())
        async with lock:
            for name in (hex_of(diff_id), chain):
                size = self._bytes.get(name)
                if size is not None:
                    meter.skip(descriptor.digest)
                    return ReadyLayer(name, size)
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

    async def _unpack(self, blob: Path, descriptor: Descriptor, diff_id: str, chain: str, meter: Meter) -> ReadyLayer:
        made = self._disk.new_path()
        stop = threading.Event()
        on_bytes = meter.from_thread(descriptor.digest)
        try:
            found: Unpacked = await in_thread(
                lambda: self._unpacker(
                    blob, made, diff_id=diff_id, bytes_max=self._unpacked_bytes_max, on_bytes=on_bytes, stop=stop
                ),
                stop=stop,
            )
        except BaseException as error:
            self._disk.release_path(made)
            if isinstance(error, AtollError) and not isinstance(error, DeadlineExceeded):
                self._disk.drop_blobs([descriptor.digest])
            raise
        if found.implied and chain != hex_of(diff_id):
            return ReadyLayer(chain, found.size_bytes, made, found.implied)
        self._disk.keep_layer(made, hex_of(diff_id))
        self._disk.release_path(made)
        self._bytes[hex_of(diff_id)] = found.size_bytes
        return ReadyLayer(hex_of(diff_id), found.size_bytes)

    async def _settle(self, ready: Sequence[ReadyLayer]) -> None:
        """Put in place the layers that depend on those below, after they have taken what they need from them."""
        names: list[str] = []
        try:
            for layer in ready:
                if layer.made is not None:
                    lower = [self._disk.layer(name) for name in names]
                    await in_thread(functools.partial(copy_attributes, layer.made, layer.implied, lower))
                    self._disk.keep_layer(layer.made, layer.name)
                    self._bytes[layer.name] = layer.size_bytes
                names.append(layer.name)
        finally:
            self._release(ready)

    def _release(self, layers: Iterable[ReadyLayer]) -> None:
        for layer in layers:
            if layer.made is not None:
                self._disk.release_path(layer.made)


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return each layer's chain id by the OCI image specification, as a directory name: `c-HEX`, the first plain `HEX`."""
    names: list[str] = []
    chain = ""
    for diff_id in diff_ids:
        chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
        names.append(f"c-{hex_of(chain)}" if names else hex_of(chain))
    return names


def layer_names(resolved: Resolved, config: ConfigFile) -> list[str]:
    """Return all that a pull of the image relies on: itself, its blobs, its layers under either name."""
    diff_ids = config.rootfs.diff_ids
    names = {resolved.digest, *chain_ids(diff_ids)} | {hex_of(diff_id) for diff_id in diff_ids}
    return [*names, *{layer.digest for layer in resolved.manifest.layers}]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error to report: ours before others."""
    ours, _ = errors.split(AtollError)
    error: BaseException = ours or errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
