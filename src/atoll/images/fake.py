"""Images without a registry, for the simulator and for tests of the agent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from atoll.model.errors import AtollError, ImageError
from atoll.model.ports.images import Image, ImageConfig, ImageTrouble, PullProgress

FAKE_IMAGE_BYTES = 40 << 20
TREES = Path("/fake/trees")
"""Where the files of fake images are said to be. Nothing is there."""
SHOWN = Path("/fake/lazy")
"""The same of those that are shown before they are here."""


class FakeImages:
    """Implements the `Images` port over images that exist by name.

    With `anything=True` every reference names an image; otherwise only those given to `add`. `sleep` is how a pull
    passes its time: the simulator gives that of its virtual clock.
    """

    def __init__(
        self,
        *,
        anything: bool = True,
        delay_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._anything = anything
        self._delay_s = delay_s
        self._sleep = sleep
        self._known: dict[str, Image] = {}
        self._ready: dict[str, Image] = {}
        self._pulling: dict[str, asyncio.Task[Image]] = {}
        self._delays: dict[str, float] = {}
        self._failures: dict[str, list[AtollError]] = {}
        self._lazy: set[str] = set()
        self._shown: dict[str, Image] = {}
        self._troubles: asyncio.Queue[ImageTrouble] = asyncio.Queue()
        self.pulls: list[str] = []
        """References in the order in which a pull of them began; a shared pull counts once."""
        self.lookups: list[str] = []
        """References whose present digest was asked for."""

    def add(
        self,
        reference: str,
        *,
        config: ImageConfig | None = None,
        layers: tuple[Path, ...] = (),
        ready: bool = False,
        size_bytes: int = FAKE_IMAGE_BYTES,
        content: str = "",
    ) -> Image:
        """Make `reference` exist in the registry and return its image; with `ready` it is on this node already.

        Other `content` under the same reference is another image, as when a tag is pushed again.
        """
        digest = reference.rpartition("@")[2] if "@" in reference else fake_digest(reference + content)
        config = config or ImageConfig(command=("/bin/app",))
        image = Image(reference=reference, digest=digest, config=config, layers=layers, size_bytes=size_bytes)
        self._known[reference] = image
        if ready:
            self._ready[reference] = image
        return image

    def remove(self, reference: str) -> None:
        """Make `reference` unknown to the registry; what this node already has stays."""
        self._known.pop(reference, None)

    def delay(self, reference: str, seconds: float) -> None:
        """Let every later pull of `reference` take `seconds`."""
        self._delays[reference] = seconds

    def fail(self, reference: str, error: AtollError, *, times: int = 1) -> None:
        """Let the next `times` pulls of `reference` raise `error` after their delay."""
        self._failures.setdefault(reference, []).extend([error] * times)

    async def current(self, reference: str) -> str:
        self.lookups.append(reference)
        failures = self._failures.get(reference)
        if failures:
            raise failures.pop(0)
        return self._registered(reference).digest

    async def ensure(
        self,
        reference: str,
        *,
        digest: str | None = None,
        progress: Callable[[PullProgress], None] | None = None,
        lazily: bool = False,
    ) -> Image:
        if lazily and reference in self._lazy:
            self._shown[reference] = self._registered(reference)
        ready = await self.find(reference, lazily=lazily)
        if ready is not None and digest in (None, ready.digest):
            return ready
        task = self._pulling.get(reference)
        if task is None:
            task = self._pulling[reference] = asyncio.create_task(self._pull(reference))
            task.add_done_callback(lambda done: self._pulled(reference, done))
        if progress is not None:
            progress(PullProgress("download", 0, FAKE_IMAGE_BYTES))
        image = await asyncio.shield(task)
        if progress is not None:
            progress(PullProgress("unpack", FAKE_IMAGE_BYTES, FAKE_IMAGE_BYTES))
        return image

    async def find(self, reference: str, *, lazily: bool = False) -> Image | None:
        digest = reference.rpartition("@")[2]
        if lazily and reference not in self._ready and (shown := self._shown.get(reference)) is not None:
            return replace(shown, layers=())
        by_digest = (replace(image, reference=reference) for image in self._ready.values() if image.digest == digest)
        return self._ready.get(reference) or next(by_digest, None)

    def digests(self) -> Sequence[str]:
        return tuple(dict.fromkeys(image.digest for image in reversed(self._ready.values())))

    async def tree(self, image: Image) -> Path:
        if image.reference in self._shown and image.reference not in self._ready:
            return SHOWN / image.digest.removeprefix("sha256:")
        return image.layers[0] if len(image.layers) == 1 else TREES / image.digest.removeprefix("sha256:")

    async def troubles(self) -> AsyncIterator[ImageTrouble]:
        while True:
            yield await self._troubles.get()

    def show_early(self, reference: str) -> None:
        """Let `reference` be one that can be shown before it is here."""
        self._lazy.add(reference)

    def trouble(self, reference: str, message: str) -> None:
        """Let pieces of `reference`, which is shown, not come."""
        shown = self._shown[reference]
        self._troubles.put_nowait(ImageTrouble(reference=reference, digest=shown.digest, message=message))

    async def collect(self, keep: Sequence[str]) -> int:
        gone = {reference: image for reference, image in self._ready.items() if image.digest not in set(keep)}
        for reference in gone:
            del self._ready[reference]
        return sum(image.size_bytes for image in {image.digest: image for image in gone.values()}.values())

    async def _pull(self, reference: str) -> Image:
        self.pulls.append(reference)
        seconds = self._delays.get(reference, self._delay_s)
        if seconds:
            await self._sleep(seconds)
        failures = self._failures.get(reference)
        if failures:
            raise failures.pop(0)
        image = self._ready[reference] = self._registered(reference)
        return image

    def _registered(self, reference: str) -> Image:
        image = self._known.get(reference)
        if image is None:
            if not self._anything:
                raise ImageError(f"no image {reference!r} in the registry", mend="check the name and the tag")
            image = self.add(reference)
        return image

    def _pulled(self, reference: str, task: asyncio.Task[Image]) -> None:
        self._pulling.pop(reference, None)
        if not task.cancelled():
            task.exception()  # read here, so that a pull that nobody waits for any more does not warn


def fake_digest(text: str) -> str:
    """Return the digest that a fake image of this name has."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
