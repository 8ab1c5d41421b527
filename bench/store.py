"""The stores behind their one contract: puts one after another and together, put → watch, and a leading member killed."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from atoll.model.errors import AtollError
from atoll.model.ports.store import Revision, Store
from atoll.store.etcd.errors import FLAGS
from atoll.store.etcd.private import PrivateEtcd
from atoll.store.etcd.store import EtcdStore
from atoll.store.memory import MemoryStore
from atoll.store.sqlite import SqliteStore
from bench.report import Report, Result, median

ROUNDS = 3
ROUND_S = 2.0
WRITERS = 64
WATCHED = 100
VALUE = bytes(800)
FAILOVERS = 5
DEADLINE_S = 30
WRITE_PAUSE_S = 0.01
TIMERS_MS = ((30, 300), (100, 1000))
"""Heartbeat and election: for members in one LAN, and etcd's own defaults."""


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench store")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--failovers", type=int, default=FAILOVERS)
    given = parser.parse_args(arguments)
    report = Report(
        "store",
        notes=[
            f"medians of {given.rounds} rounds of {ROUND_S:g} s, values of {len(VALUE)} bytes; all on one machine",
            "data on the disk of the temporary directory, synced before each answer (not the memory store)",
        ],
    )
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(_measure(report, given.rounds, given.failovers))
    return report


@asynccontextmanager
async def _memory(_: Path) -> AsyncIterator[Store]:
    yield MemoryStore()


@asynccontextmanager
async def _sqlite(work: Path) -> AsyncIterator[Store]:
    store = await SqliteStore.open(work / "state.db")
    yield store
    await store.close()


def _etcd(members: int) -> Callable[[Path], object]:
    @asynccontextmanager
    async def opened(work: Path) -> AsyncIterator[Store]:
        data = work / "etcd"
        data.mkdir()
        with PrivateEtcd(members, data=data) as etcd:
            store = await EtcdStore.open(etcd.address)
            yield store
            await store.close()

    return opened


async def _measure(report: Report, rounds: int, failovers: int) -> None:
    stores = {"memory": _memory, "SQLite": _sqlite, "etcd, one member": _etcd(1), "etcd, three members": _etcd(3)}
    for name, opening in stores.items():
        if name.startswith("etcd") and shutil.which("etcd") is None:
            report.add(Result(f"{name}", None, "1/s", why="there is no etcd on this machine"))
            continue
        work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
        try:
            async with opening(work) as store:  # type: ignore[operator]
                alone = median([await _alone(store) for _ in range(rounds)])
                together = median([await _together(store) for _ in range(rounds)])
                watched = median([await _watched(store) for _ in range(rounds)])
            report.add(Result(f"{name}: puts by one client after another", alone, "1/s"))
            report.add(Result(f"{name}: puts by {WRITERS} clients together", together, "1/s"))
            report.add(Result(f"{name}: put begun → seen by a watch, median", watched, "ms"))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if shutil.which("etcd") is not None and failovers:
        for heartbeat_ms, election_ms in TIMERS_MS:
            gaps = [await _failover(heartbeat_ms, election_ms) for _ in range(failovers)]
            what = f"etcd, three members, timers {heartbeat_ms} and {election_ms} ms: leading member killed → next write answered"
            report.add(Result(f"{what}, median", median(gaps), "s", goal="<= 1.0"))
            report.add(Result("the same, longest", max(gaps), "s"))


async def _alone(store: Store) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < ROUND_S:
        await store.put(f"a/{count % 1_000}", VALUE)
        count += 1
    return count / (time.perf_counter() - began)


async def _together(store: Store) -> float:
    end = time.perf_counter() + ROUND_S
    counts = [0] * WRITERS

    async def write(who: int) -> None:
        while time.perf_counter() < end:
            await store.put(f"w/{who}/{counts[who] % 100}", VALUE)
            counts[who] += 1
            await asyncio.sleep(0)

    began = time.perf_counter()
    await asyncio.gather(*(write(who) for who in range(WRITERS)))
    return sum(counts) / (time.perf_counter() - began)


async def _watched(store: Store) -> float:
    spans: list[float] = []
    watch = store.watch("seen/", start=Revision(await store.revision() + 1))
    await store.put("seen/first", VALUE)
    await anext(watch)
    for n in range(WATCHED):
        coming = asyncio.ensure_future(anext(watch))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        began = time.perf_counter()
        writing = asyncio.ensure_future(store.put(f"seen/{n}", VALUE))
        await coming
        spans.append((time.perf_counter() - began) * 1_000)
        await writing
    return statistics.median(spans)


async def _failover(heartbeat_ms: int, election_ms: int) -> float:
    """Kill the leading member under load of three clients and return the longest time in which none of them was answered."""
    timers = f" --heartbeat-interval={heartbeat_ms} --election-timeout={election_ms}"
    with PrivateEtcd(3, flags=FLAGS + timers) as etcd:
        leader = etcd.leader()
        store = await EtcdStore.open(etcd.address)
        answered: list[float] = []

        async def write(who: int) -> None:
            n = 0
            while True:
                n += 1
                try:
                    await store.put(f"f/{who}/{n}", VALUE)
                    answered.append(time.perf_counter())
                except AtollError:
                    pass
                await asyncio.sleep(WRITE_PAUSE_S)

        writers = [asyncio.create_task(write(who)) for who in range(3)]
        await _until(lambda: len(answered) > 100)
        killed = time.perf_counter()
        etcd.kill(leader)
        await _until(lambda: answered[-1] > killed + 0.2)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        await store.close()
    around = [at for at in answered if at > killed - 0.1]
    return max(after - before for before, after in itertools.pairwise(around))


async def _until(holds: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + DEADLINE_S
    while not holds() and time.perf_counter() < deadline:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.005)
