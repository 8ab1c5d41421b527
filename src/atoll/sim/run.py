"""One seed, one run."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import structlog
from msgspec import Struct

from atoll.sim.faults import Profile, profile_of
from atoll.sim.loop import Deadlock, Livelock, run_virtual
from atoll.sim.story import Story, listen
from atoll.sim.world import Parts, World

_SHM = Path("/dev/shm")  # noqa: S108 - only a place that is fast; the directory is made by mkdtemp

AFTERMATH_S = 1.0
"""How long a run goes on after a promise was broken, for its story's sake."""

_freeze_once = functools.cache(gc.freeze)


class Outcome(Struct, frozen=True):
    """`broken` is empty when every promise held. Runs of one seed have one `fingerprint`."""

    seed: int
    profile: Profile
    broken: tuple[str, ...]
    fingerprint: str
    marks: Counter[str]
    story: tuple[str, ...]
    virtual_s: float
    steps: int


async def _until_broken(world: World, story: Story) -> None:
    """Run `world` to its end, or until shortly after a promise was broken."""
    living = asyncio.create_task(world.run(), name="world")
    failing = asyncio.create_task(story.failed.wait(), name="failing")
    await asyncio.wait({living, failing}, return_when=asyncio.FIRST_COMPLETED)
    if not living.done():
        await asyncio.sleep(AFTERMATH_S)
    for task in (living, failing):
        task.cancel()
    results = await asyncio.gather(living, failing, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


def run_seed(
    seed: int,
    parts: Parts | None = None,
    shape: Callable[[Profile], Profile] = lambda profile: profile,
    world: type[World] = World,
    *,
    told: bool = True,
) -> Outcome:
    """Run one seed to its end. Deterministic within one process as well as across processes with one PYTHONHASHSEED.

    Its story is put into words where it is to be `told`, or a promise was broken.
    `shape` may change what the seed's run is made of, and `world` its course, to look for something in particular.
    """
    choose = random.Random(seed)
    profile = shape(profile_of(choose))
    data = Path(tempfile.mkdtemp(prefix="atoll-sim-", dir=_SHM if _SHM.is_dir() else None))
    story = Story(lambda: 0.0)
    facts = {"virtual_s": 0.0, "steps": 0.0}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        story.clock(loop.time)
        try:
            await _until_broken(world(profile, choose, data, story, parts or Parts()), story)
        finally:
            facts["virtual_s"] = loop.time()
            facts["steps"] = getattr(loop, "steps", 0)

    # A collection at an unforeseen moment would close generators at that moment.
    collecting = gc.isenabled()
    gc.disable()
    _freeze_once()  # what was loaded stays: to look through it after each seed would take longer than the seed's own
    listen(story)
    try:
        run_virtual(main, choose, shuffle=profile.shuffle)
    except (Deadlock, Livelock) as error:
        story.breaks(f"{type(error).__name__}: {error}")
    finally:
        structlog.reset_defaults()
        shutil.rmtree(data, ignore_errors=True)
        if collecting:
            gc.enable()
            gc.collect()
    return Outcome(
        seed=seed,
        profile=profile,
        broken=tuple(story.broken),
        fingerprint=story.fingerprint,
        marks=story.marks,
        story=tuple(story.lines()) if told or story.broken else (),
        virtual_s=facts["virtual_s"],
        steps=int(facts["steps"]),
    )
