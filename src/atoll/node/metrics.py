"""What apps say of themselves: the metrics that a spec names, asked for along with each heartbeat.

An answer is Prometheus' text format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats). Of a name that stands there with
several labels the samples are summed up: an instance has one figure for each name.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import httptools
from msgspec import UNSET, Struct
from msgspec.structs import replace

from atoll.model.errors import AtollError, Invalid, TooLarge, Unavailable
from atoll.model.records import Assignment, Severity, Usage
from atoll.model.spec import AppSpec
from atoll.model.states import Phase
from atoll.node.report import Reporter
from atoll.node.tools import Scraper
from atoll.node.transitions import State

ROUND_S = 2.0
"""Deadline of asking all instances of the node; who has not answered by then has no reading this time."""
SCRAPES_MAX = 16
"""Instances that are asked at a time."""
BODY_BYTES_MAX = 256 << 10
HEAD_BYTES_MAX = 64 << 10

SAMPLES_MAX = 10_000
"""Lines of the wanted names in one answer."""
NUMBER_CHARACTERS_MAX = 64

# Possessive throughout: an app must not be able to hold up the agent with a line that is tried in many ways.
_LABEL = r'[ \t]*+[a-zA-Z_][a-zA-Z0-9_]*+[ \t]*+=[ \t]*+"(?:[^"\\\n]|\\.)*+"[ \t]*+'
_REST = re.compile(
    rf"(?:[ \t]*+\{{(?:{_LABEL}(?:,{_LABEL})*+,?+[ \t]*+|[ \t]*+)\}}[ \t]*+|[ \t]++)"
    r"([-+]?(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][-+]?[0-9]++)?+|NaN|[-+]?Inf)"
    r"(?:[ \t]++-?[0-9]++)?[ \t\r]*+"
)


class Target(Struct, frozen=True, kw_only=True):
    """One instance that gives metrics away."""

    instance: str
    project: str
    address: str
    port: int
    path: str
    names: tuple[str, ...]
    needed: str | None = None
    """The one that its number of instances depends on."""


def target_of(assignment: Assignment, state: State) -> Target | None:
    """Return what to ask of an instance; None for one that is not ready, or whose spec names no metric."""
    workload = assignment.workload
    if not isinstance(workload, AppSpec) or workload.metrics is None:
        return None
    port = workload.port_named(workload.metrics.port)
    if port is None or state.address is None or not state.ready or state.phase is not Phase.RUNNING:
        return None
    needed = None if workload.scale is UNSET else workload.scale.metric
    names = dict.fromkeys((*((needed,) if needed else ()), *workload.metrics.names))
    if not names:
        return None
    return Target(
        instance=assignment.instance.id,
        project=assignment.instance.project,
        address=state.address,
        port=port.port,
        path=workload.metrics.path,
        names=tuple(names),
        needed=needed,
    )


def read_samples(text: str, names: tuple[str, ...]) -> dict[str, float]:
    """Return for each of `names` the sum of its samples; one that is not there, or is no finite number, is left out.

    Only lines of these names are looked at. Raises Invalid, with the line's number, for one of them that is not in the format, and
    for too many of them.
    """
    found: dict[str, float] = {}
    for count, line in enumerate(_lines_of(names).finditer(text)):
        rest = _REST.fullmatch(line[2])
        if rest is None or len(rest[1]) > NUMBER_CHARACTERS_MAX:
            number = text.count("\n", 0, line.start()) + 1
            raise Invalid(f"line {number} of its answer is not in Prometheus' text format")
        if count >= SAMPLES_MAX:
            raise Invalid(f"its answer has over {SAMPLES_MAX} samples of what is asked for")
        found[line[1]] = found.get(line[1], 0.0) + float(rest[1])
    return {name: value for name, value in found.items() if math.isfinite(value)}


@lru_cache(maxsize=1_000)
def _lines_of(names: tuple[str, ...]) -> re.Pattern[str]:
    either = "|".join(re.escape(name) for name in names)
    return re.compile(rf"^[ \t]*+({either})(?![a-zA-Z0-9_:])(.*+)$", re.MULTILINE)


class NetworkScraper:
    """Implements `tools.Scraper` from the node's own network namespace, in HTTP/1.1."""

    async def scrape(self, address: str, port: int, path: str) -> bytes:
        try:
            reader, writer = await asyncio.open_connection(address, port, limit=HEAD_BYTES_MAX)
        except OSError as error:
            raise Unavailable(_words(error)) from None
        try:
            target = path.encode("ascii", "replace").replace(b" ", b"%20").replace(b"\r", b"").replace(b"\n", b"")
            writer.write(b"GET %b HTTP/1.1\r\nHost: %b:%d\r\nUser-Agent: atoll-metrics\r\n" % (target, address.encode(), port))
            writer.write(b"Accept: text/plain;version=0.0.4\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n")
            return await _answer(reader)
        except OSError as error:
            raise Unavailable(_words(error)) from None
        finally:
            writer.transport.abort()


class _Answer:
    """Collects what httptools finds."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False
        self.framed = False
        """Its end is known before the connection ends."""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.framed = self.framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Return the body of an answer with status 200. Raises Unavailable, TooLarge."""
    answer, size = _Answer(), 0
    parser = httptools.HttpResponseParser(answer)
    try:
        while not answer.complete and (data := await reader.read(1 << 16)):
            size += len(data)
            if len(answer.body) > BODY_BYTES_MAX or size > BODY_BYTES_MAX + HEAD_BYTES_MAX:
                raise TooLarge(f"its answer is over {BODY_BYTES_MAX >> 10} KiB")
            parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        raise Unavailable("its answer is not HTTP") from None
    if not size:
        raise Unavailable("it closed the connection without an answer")
    if parser.get_status_code() != 200:
        raise Unavailable(f"it answered {parser.get_status_code()}")
    if answer.framed and not answer.complete:
        raise Unavailable("it broke off its answer")
    if len(answer.body) > BODY_BYTES_MAX:
        raise TooLarge(f"its answer is over {BODY_BYTES_MAX >> 10} KiB")
    return bytes(answer.body)


def _words(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)


class Scrapes:
    """Asks instances for their metrics, a round at a time, and says of each once that it failed, and again after it has worked."""

    def __init__(self, scraper: Scraper, reporter: Reporter) -> None:
        self._scraper = scraper
        self._reporter = reporter
        self._failing: set[str] = set()

    async def ask(self, targets: Iterable[Target]) -> dict[str, dict[str, float]]:
        """Return instance → its metrics, of those that answered within `ROUND_S`. Never raises for what an instance does."""
        # Who failed last time comes last, so that those who hang keep nobody else waiting for a turn.
        targets = sorted(targets, key=lambda target: target.instance in self._failing)
        self._failing &= {target.instance for target in targets}
        if not targets:
            return {}
        turns = asyncio.Semaphore(SCRAPES_MAX)
        readings: dict[str, dict[str, float]] = {}
        asked: set[str] = set()
        tasks = [asyncio.create_task(self._one(target, turns, asked, readings)) for target in targets]
        try:
            await asyncio.wait(tasks, timeout=ROUND_S)
        finally:
            late = [target for target, task in zip(targets, tasks, strict=True) if not task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for target in late:
            if target.instance in asked:
                self._failed(target, f"no answer within {ROUND_S:g} s")
        return readings

    async def _one(self, target: Target, turns: asyncio.Semaphore, asked: set[str], readings: dict[str, dict[str, float]]) -> None:
        async with turns:
            asked.add(target.instance)
            try:
                body = await self._scraper.scrape(target.address, target.port, target.path)
                found = read_samples(body.decode("utf-8", "replace"), target.names)
            except AtollError as error:
                self._failed(target, error.message)
                return
            except Exception as error:  # noqa: BLE001 - the outer edge of a task: a scrape that breaks is one that fails
                self._failed(target, f"a fault: {type(error).__name__}: {error}")
                return
        readings[target.instance] = found
        if target.needed is not None and target.needed not in found:
            self._failed(target, f"its answer has no number for '{target.needed}'")
        else:
            self._failing.discard(target.instance)

    def _failed(self, target: Target, why: str) -> None:
        if target.instance in self._failing:
            return
        self._failing.add(target.instance)
        text = f"GET {target.path} on port {target.port} gives no metrics: {why}"
        self._reporter.event(target.project, f"instance/{target.instance}", "metrics-failed", text, Severity.WARNING)


def with_metrics(found: Sequence[Usage], readings: dict[str, dict[str, float]]) -> tuple[Usage, ...]:
    """Return usages with what their instances said of themselves; one whose use could not be read has that alone."""
    known = {usage.instance for usage in found}
    joined = [replace(usage, metrics=readings[usage.instance]) if usage.instance in readings else usage for usage in found]
    return (*joined, *(Usage(instance=id, metrics=metrics) for id, metrics in readings.items() if id not in known))
