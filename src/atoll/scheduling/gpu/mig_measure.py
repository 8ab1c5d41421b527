"""How near MIG placement comes to the exact optimum, on random streams of requests that come, hold a partition and leave.

One device, nothing is moved, and by the rule that all three players keep what fits is accepted: they differ in where it goes.

- `ours`: `choose`, as every plan uses it.
- `optimum`: the best that can be without knowing the future: the policy that accepts the most memory in the long run, found
  exactly, by value iteration over all layouts of the device.
- `clairvoyant`: the best that can be with the whole stream known beforehand, by dynamic programming over every placement of every
  request. It may keep a large request out by where it puts a small one, because it knows when that one leaves; no policy that
  does not know the future reaches it.

Requests come as a Poisson process, each for a profile drawn by `weights`, and stay for an exponential time. `load` is the memory
that they would hold on average, beside the device's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from atoll.model.devices import COMPUTE_SLICES, MEMORY_SLICES, GpuDevice, GpuGrant, MigProfile
from atoll.model.spec import Gpu
from atoll.scheduling.gpu.grants import grant
from atoll.scheduling.gpu.mig import Layout, Table, table_of, with_part

Ints = npt.NDArray[np.int64]
Start = Callable[[Layout, str], int | None]
"""Where a policy puts a profile on a layout; None where no start is free."""

REQUESTS = 200
LOAD = 0.8
STATES_MAX = 300_000
"""Placements of what runs that the clairvoyant follows side by side; a stream with more is not counted for it."""
_ROUNDS_MAX = 5_000
_PRECISION = 1e-7
_GIB = 1 << 30
_SLICE_GB = {
    "A100-40GB": (5, 10, 20, 40),
    "A100-80GB": (10, 20, 40, 80),
    "H100-80GB": (10, 20, 40, 80),
    "H100-94GB": (12, 24, 47, 94),
    "H200-141GB": (18, 35, 71, 141),
}
"""What the names of profiles of 1, 2, 4 and 8 memory slices say."""
MODELS = tuple(_SLICE_GB)


class Event(Struct, frozen=True):
    """A request comes (`arrives`), or the one of that number leaves."""

    arrives: bool
    number: int
    profile: str


class Comparison(Struct, frozen=True, kw_only=True):
    """Sums over all streams, in bytes of accepted memory."""

    model: str
    load: float
    streams: int
    offered_bytes: int
    ours_bytes: int
    optimum_bytes: int
    """Of the best policy that does not know the future."""
    clairvoyant_bytes: int | None
    """None where a stream was too long for it."""
    needless: int
    """Requests that ours refused although a start was free."""
    long_run: float
    """Ours beside the optimum on an endless stream, computed exactly and not drawn."""

    @property
    def ratio(self) -> float:
        """Ours beside the best policy that does not know the future either."""
        return self.ours_bytes / self.optimum_bytes

    @property
    def clairvoyant_ratio(self) -> float | None:
        return self.ours_bytes / self.clairvoyant_bytes if self.clairvoyant_bytes else None


def profiles_of(model: str) -> tuple[MigProfile, ...]:
    """Return the profiles that a model of `MODELS` offers, memory as its names say."""
    one, two, four, eight = _SLICE_GB[model]
    rows = (
        (f"1g.{one}gb", 1, 1, one, range(7), 7),
        (f"1g.{one}gb+me", 1, 1, one, range(7), 1),
        (f"1g.{two}gb", 1, 2, two, range(0, 8, 2), 4),
        (f"2g.{two}gb", 2, 2, two, range(0, 6, 2), 3),
        (f"3g.{four}gb", 3, 4, four, range(0, 8, 4), 2),
        (f"4g.{four}gb", 4, 4, four, range(1), 1),
        (f"7g.{eight}gb", 7, 8, eight, range(1), 1),
    )
    return tuple(
        MigProfile(name=name, compute_slices=compute, memory_slices=slices, memory_bytes=gb * _GIB, starts=tuple(starts), most=most)
        for name, compute, slices, gb, starts, most in rows
    )


def compare(
    seeds: Iterable[int],
    model: str,
    *,
    requests: int = REQUESTS,
    load: float = LOAD,
    weights: Sequence[float] | None = None,
    clairvoyant: bool = True,
) -> Comparison:
    """Measure one model over one stream for each seed. The same arguments give the same answer.

    `weights` are how often each of `profiles_of` comes; equally often where absent. Some seconds for a model.
    """
    table = table_of(profiles_of(model))
    weights = tuple(weights or (1.0,) * len(table.profiles))
    chain = _chain_of(table, weights, load)
    values, best_rate = chain.best()
    policy = chain.policy(values)
    streams = [stream(seed, table, requests, load, weights) for seed in seeds]
    known = [_clairvoyant(table, events) for events in streams] if clairvoyant else [None]
    ours = [_ours(model, table, events) for events in streams]
    return Comparison(
        model=model,
        load=load,
        streams=len(streams),
        offered_bytes=sum(table.by_name[event.profile].memory_bytes for events in streams for event in events if event.arrives),
        ours_bytes=sum(accepted for accepted, _ in ours),
        optimum_bytes=sum(_accepted(table, events, policy) for events in streams),
        clairvoyant_bytes=None if None in known else sum(one for one in known if one is not None),
        needless=sum(needless for _, needless in ours),
        long_run=chain.rate(table.best_start) / best_rate,
    )


def stream(seed: int, table: Table, requests: int, load: float, weights: Sequence[float]) -> list[Event]:
    """Return the events of one random stream, in order of time."""
    chance = random.Random(seed)
    rate = _rate(table, load, weights)
    now, events = 0.0, []
    for number in range(requests):
        now += chance.expovariate(rate)
        profile = chance.choices(table.profiles, weights)[0].name
        events.append((now, number, Event(True, number, profile)))
        events.append((now + chance.expovariate(1.0), number, Event(False, number, profile)))
    return [event for _, _, event in sorted(events, key=lambda one: one[:2])]


def _rate(table: Table, load: float, weights: Sequence[float]) -> float:
    """Return the requests in the mean time that one stays."""
    mean = sum(often * profile.memory_slices for often, profile in zip(weights, table.profiles, strict=True)) / sum(weights)
    return load * MEMORY_SLICES / mean


def _ours(model: str, table: Table, events: Sequence[Event]) -> tuple[int, int]:
    """Return what is accepted by the scheduler's own choice, and how often it refused although a start was free."""
    device = GpuDevice(id="gpu", model=model, memory_bytes=_SLICE_GB[model][-1] * _GIB, mig=True, profiles=table.profiles)
    held: dict[int, GpuGrant] = {}
    accepted = needless = 0
    for event in events:
        if not event.arrives:
            held.pop(event.number, None)
            continue
        given = grant([device], held.values(), Gpu(profile=event.profile))
        if given is not None:
            held[event.number] = given[0]
            accepted += given[0].memory_bytes
        else:
            needless += _start_is_free(table, held.values(), event.profile)
    return accepted, needless


def _start_is_free(table: Table, held: Iterable[GpuGrant], name: str) -> bool:
    """Whether one more would fit, by the plainest of means."""
    profile, held = table.by_name[name], list(held)
    taken = {place for one in held for place in range(one.start, one.start + one.size)}
    compute = sum(table.by_name[one.profile].compute_slices for one in held) + profile.compute_slices
    few = sum(one.profile == name for one in held) < profile.most
    runs = [set(range(start, start + profile.memory_slices)) for start in profile.starts]
    return compute <= COMPUTE_SLICES and few and any(not run & taken for run in runs)


def _accepted(table: Table, events: Sequence[Event], policy: Start) -> int:
    """Return what a policy accepts of a stream."""
    layout: Layout = ()
    where: dict[int, int] = {}
    accepted = 0
    for event in events:
        if event.arrives:
            start = policy(layout, event.profile)
            if start is not None:
                where[event.number] = start
                layout = with_part(layout, table.part(event.profile, start))
                accepted += table.by_name[event.profile].memory_bytes
        elif event.number in where:
            start = where.pop(event.number)
            layout = tuple(part for part in layout if part.start != start)
    return accepted


def _clairvoyant(table: Table, events: Sequence[Event]) -> int | None:
    """Return the most that can be accepted of a stream, where what fits must be accepted; None where it takes too long."""
    best: dict[tuple[tuple[int, int], ...], int] = {(): 0}
    profile_of = [event.profile for event in sorted((e for e in events if e.arrives), key=lambda e: e.number)]
    for event in events:
        after: dict[tuple[tuple[int, int], ...], int] = {}
        for placed, accepted in best.items():
            if not event.arrives:
                left = tuple(one for one in placed if one[1] != event.number)
                after[left] = max(after.get(left, 0), accepted)
                continue
            layout = tuple(table.part(profile_of[number], start) for start, number in placed)
            starts = table.starts(layout, event.profile)
            more = accepted + table.by_name[event.profile].memory_bytes
            for start in starts:
                with_it = tuple(sorted((*placed, (start, event.number))))
                after[with_it] = max(after.get(with_it, 0), more)
            if not starts:
                after[placed] = max(after.get(placed, 0), accepted)
        best = after
        if len(best) > STATES_MAX:
            return None
    return max(best.values())


class _Chain:
    """All layouts of a device as a Markov chain in steps of equal mean length: a request comes, one leaves, or nothing happens."""

    def __init__(self, table: Table, weights: Sequence[float], load: float) -> None:
        self._table = table
        self._numbers: dict[Layout, int] = {(): 0}
        layouts: list[Layout] = [()]
        for layout in layouts:
            for profile in table.profiles:
                for start in table.starts(layout, profile.name):
                    more = with_part(layout, table.part(profile.name, start))
                    if more not in self._numbers:
                        self._numbers[more] = len(layouts)
                        layouts.append(more)
        self._layouts = layouts
        names = [profile.name for profile in table.profiles]
        nowhere = len(layouts)
        self._to: Ints = np.full((len(layouts), len(names), MEMORY_SLICES), nowhere, dtype=np.int64)
        """By layout, profile and start: the layout after it."""
        self._leave: Ints = np.repeat(np.arange(len(layouts))[:, None], COMPUTE_SLICES, axis=1)
        """By layout and partition: the layout without it; itself beyond the last."""
        for number, layout in enumerate(layouts):
            for kind, name in enumerate(names):
                for start in table.starts(layout, name):
                    self._to[number, kind, start] = self._numbers[with_part(layout, table.part(name, start))]
            for place in range(len(layout)):
                self._leave[number, place] = self._numbers[layout[:place] + layout[place + 1 :]]
        rate = _rate(table, load, weights)
        self._arrive = np.array(weights) / sum(weights) * rate / (rate + COMPUTE_SLICES)
        self._depart = 1.0 / (rate + COMPUTE_SLICES)
        self._bytes = np.array([profile.memory_bytes / _GIB for profile in table.profiles])
        self._nowhere = nowhere

    def best(self) -> tuple[npt.NDArray[np.float64], float]:
        """Return the value of every layout under the best policy, and the memory (GiB) that it accepts in a step."""
        return self._solve(self._to)

    def rate(self, policy: Start) -> float:
        """Return the memory (GiB) that a policy accepts in a step in the long run."""
        only = np.full_like(self._to, self._nowhere)
        for number, layout in enumerate(self._layouts):
            for kind, profile in enumerate(self._table.profiles):
                start = policy(layout, profile.name)
                if start is not None:
                    only[number, kind, start] = self._to[number, kind, start]
        return self._solve(only)[1]

    def policy(self, values: npt.NDArray[np.float64]) -> Start:
        """Return the policy that goes by these values."""

        def start_for(layout: Layout, name: str) -> int | None:
            def value(start: int) -> float:
                return float(values[self._numbers[with_part(layout, self._table.part(name, start))]])

            return max(self._table.starts(layout, name), key=value, default=None)

        return start_for

    def _solve(self, to: Ints) -> tuple[npt.NDArray[np.float64], float]:
        values = np.zeros(len(self._layouts))
        for _ in range(_ROUNDS_MAX):
            padded = np.append(values, -np.inf)
            placed = padded[to].max(axis=2) + self._bytes
            comes = np.where(np.isfinite(placed), placed, values[:, None]) @ self._arrive
            after = comes + values[self._leave].sum(axis=1) * self._depart
            change = after - values
            values = after - after[0]
            if change.max() - change.min() < _PRECISION:
                break
        return values, float((change.max() + change.min()) / 2)


@lru_cache(maxsize=32)
def _chain_of(table: Table, weights: tuple[float, ...], load: float) -> _Chain:
    return _Chain(table, weights, load)
