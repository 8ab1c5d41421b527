"""What a node says of itself: what it is, that it lives, what is in use; and that its disk does not fill with old images."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import structlog
from msgspec import UNSET
from msgspec.structs import replace

from atoll.model.devices import GpuDevice, GpuSample
from atoll.model.errors import AtollError, Conflict, Invalid, TooLarge
from atoll.model.flows import Flows
from atoll.model.labels import NVLINK_DOMAIN
from atoll.model.records import Heartbeat, Node, Usage
from atoll.model.spec import AppSpec, RuntimeName
from atoll.node.beating import HEARTBEAT_S, Beating
from atoll.node.contact import Contact
from atoll.node.gpu_usage import owners_of, usage_of
from atoll.node.metrics import Scrapes, target_of, with_metrics
from atoll.node.prefetch import Prefetch
from atoll.node.report import Words
from atoll.node.runner import Runner
from atoll.node.tools import Machine, Tools

CALL_S = 10.0
"""Deadline of a registration or a heartbeat."""
SKIPS_MAX = 16
"""Each skip is twice as far as the one before: of an agent whose date was set back by up to 180 years."""
USAGE_S = 2.0
"""Deadline of reading one instance's usage."""
USAGES_S = 4.0
"""Deadline of reading that of all: a heartbeat goes without what has not come by then."""
USAGES_AT_ONCE = 16
IMAGES_MAX = 64
"""Digests of images in one heartbeat."""
COLLECT_S = 300.0
"""How often the disk is looked at."""
COLLECT_ABOVE = 0.80
"""Images that no instance uses are removed when the disk is fuller than this."""

log = structlog.get_logger()


def labels_of(labels: Mapping[str, str], devices: Sequence[GpuDevice]) -> dict[str, str]:
    """Return a node's labels with the NVLink domain that all its devices have joined, unless its operator names another."""
    domains = sorted({device.fabric for device in devices if device.present})
    if len(domains) != 1 or not domains[0]:
        return dict(labels)
    return {NVLINK_DOMAIN: domains[0], **labels}


class Vitals:
    """`node` is the record that is registered, but for the capacity and the runtimes, which are looked up each time."""

    def __init__(
        self,
        node: Node,
        tools: Tools,
        machine: Machine,
        runners: Mapping[str, Runner],
        prefetch: Prefetch | None = None,
        contact: Contact | None = None,
        beating: Beating | None = None,
    ) -> None:
        self._node = node
        self._tools = tools
        self._machine = machine
        self._runners = runners
        self._prefetch = prefetch
        self._scrapes = Scrapes(tools.scraper, tools.reporter)
        self._contact = contact or Contact()
        self._beating = beating
        self._words = Words(tools.clock.now())
        self._said: Node | None = None
        """What the control plane was told last, or may have been."""
        self._registered = asyncio.Event()
        self._refused: str | None = None
        """What the last heartbeat was refused for: a field, or a code."""
        self._silent: set[str] = set()
        """The instances that did not say what they use when they were asked last; they are asked after all others."""
        if beating is not None:
            beating.on_deaf = self._registered.set

    async def register(self) -> None:
        """Tell the control plane what this node is. Safe to repeat: what was said before is the same word, however often."""
        for left in reversed(range(SKIPS_MAX)):
            try:
                await self._register()
            except Conflict:  # it knows a newer word: of another call of this, or of an earlier agent whose date was later
                if not left:
                    raise
                self._words.skip()
                self._said = None
            else:
                break

    async def _register(self) -> None:
        tools, word = self._tools, self._words.next()  # before anything is looked at: a later word knows as much or more
        devices: tuple[GpuDevice, ...] = ()
        refusals: dict[RuntimeName, str] = {}
        if tools.gpus is not None:
            devices = tools.gpus.known if tools.gpus.announced is not None else await tools.gpus.look()
            refusals = tools.gpus.refusals
        foreign = await asyncio.to_thread(tools.foreign.offered) if tools.foreign is not None else ()
        node = replace(
            self._node,
            labels=labels_of(self._node.labels, devices),
            capacity=replace(self._machine.capacity(), gpus=devices, devices=foreign, gpu_refusals=refusals),
            runtimes=tuple(tools.runtimes),
            ports_taken=self._machine.ports_taken(),
            registered_at=tools.clock.now(),
            word=word,
        )
        said = self._said
        if said is not None and replace(node, registered_at=said.registered_at, word=said.word) == said:
            node = said
        self._said = node
        async with asyncio.timeout(CALL_S):
            await tools.control.register_node(node)
        if tools.gpus is not None:
            tools.gpus.announced = devices, refusals
        tools.reporter.unknown_node.clear()
        self._registered.set()  # a heartbeat follows at once, so that a node is known to be alive

    async def beat(self) -> None:
        """Send heartbeats for ever."""
        while True:
            try:
                if self._tools.reporter.unknown_node.is_set():
                    await self.register()
                await self._beat_once()
            except (Invalid, TooLarge) as error:
                why = error.field or error.code
                if why != self._refused:  # else the log would fill with it
                    log.warning("what this node says of itself is refused", node=self._node.name, error=str(error), mend=error.mend)
                self._refused = why
            except (AtollError, TimeoutError) as error:
                log.debug("heartbeat failed", node=self._node.name, error=str(error) or "timed out")
            except Exception:  # the outer edge: a surprise must not end what runs here
                log.exception("heartbeat failed", node=self._node.name)
            self._registered.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._registered.wait()

    def _pause_s(self) -> float:
        """Return how long until the next heartbeat. What scales by what is in use, and devices, are told of as often as can be."""
        pause_s = self._beating.heartbeat_s if self._beating is not None else HEARTBEAT_S
        watched = self._tools.gpus is not None or any(_scales(runner) for runner in self._runners.values())
        return min(pause_s, HEARTBEAT_S) if watched else pause_s

    async def _beat_once(self) -> None:
        cpu_milli, memory_bytes = self._machine.sample()
        gpus = await self._tools.gpus.samples() if self._tools.gpus is not None else ()
        targets = (target_of(runner.assignment, runner.state) for runner in self._runners.values())
        readings = await self._scrapes.ask([target for target in targets if target is not None])
        flows = await self._flows()
        usage = with_metrics(await self._usage(gpus, flows), readings)
        at = self._tools.clock.now()
        heartbeat = Heartbeat(
            node=self._node.name,
            at=at,
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            usage=usage,
            gpus=gpus,
            images=tuple(self._tools.images.digests()[:IMAGES_MAX]),
            fetching=self._prefetch.fetching if self._prefetch is not None else "",
            flows=replace(flows, begun={}, over={}) if flows.flows or flows.refusals else None,
        )
        sent_at = self._tools.clock.monotonic()
        async with asyncio.timeout(CALL_S):
            await self._tools.control.heartbeat(heartbeat)
        self._refused = None
        if self._beating is not None:
            self._beating.reached()
        if self._beating is None or self._beating.http_counts:
            self._contact.prove(sent_at)

    async def _flows(self) -> Flows:
        try:
            async with asyncio.timeout(USAGE_S):
                return await self._tools.network.flows()
        except (AtollError, TimeoutError) as error:
            log.debug("flows are not counted", error=str(error) or "timed out")
            return Flows()

    async def _usage(self, samples: tuple[GpuSample, ...], flows: Flows) -> tuple[Usage, ...]:
        found = []
        counters = self._tools.network.counters()
        owners = owners_of(samples, self._runners, self._machine.groups)
        runners = list(self._runners.values())
        answers = await self._ask_usage(runners)
        for runner in runners:
            if (used := answers.get(runner.id)) is None:
                continue
            if grants := runner.assignment.instance.gpus:
                of_gpus = usage_of(runner.id, grants, samples, owners)
                milli, memory_bytes = of_gpus or (0, 0)
                used = replace(used, gpu_milli=milli, gpu_memory_bytes=memory_bytes, gpu_silent=of_gpus is None)
            if (counted := counters.get(runner.id)) is not None:
                used = replace(
                    used,
                    sent_bytes=counted.sent_bytes,
                    sent_packets=counted.sent_packets,
                    received_bytes=counted.received_bytes,
                    received_packets=counted.received_packets,
                    network_drops=counted.drops,
                    connections=flows.begun.get(runner.id, 0),
                    limited_packets=flows.over.get(runner.id, 0),
                )
            found.append(used)
        return tuple(found)

    async def _ask_usage(self, runners: Sequence[Runner]) -> dict[str, Usage]:
        """Ask several at a time, so that those who are silent, as their guests may be, hold the others up for USAGES_S at most."""
        answers: dict[str, Usage] = {}
        left = iter(sorted(runners, key=lambda runner: runner.id in self._silent))
        self._silent &= {runner.id for runner in runners}

        async def ask() -> None:
            for runner in left:
                if runner.runtime is None or runner.state.pid is None:
                    continue
                try:
                    async with asyncio.timeout(USAGE_S):
                        answers[runner.id] = await runner.runtime.usage(runner.id)
                    self._silent.discard(runner.id)
                except (AtollError, TimeoutError) as error:
                    log.debug("no usage", instance=runner.id, error=str(error))
                    self._silent.add(runner.id)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(USAGES_S), asyncio.TaskGroup() as tasks:
                for _ in range(min(USAGES_AT_ONCE, len(runners))):
                    tasks.create_task(ask())
        return answers

    async def collect(self) -> None:
        """Remove images that no instance uses while the disk is nearly full, for ever."""
        while True:
            await asyncio.sleep(COLLECT_S)
            try:
                if self._machine.disk_used() > COLLECT_ABOVE:
                    keep: set[str] = set().union(*(runner.digests for runner in self._runners.values()))
                    keep |= self._prefetch.kept if self._prefetch is not None else set()
                    freed_bytes = await self._tools.images.collect(sorted(keep))
                    log.info("images collected", freed_bytes=freed_bytes)
            except (AtollError, OSError) as error:
                log.warning("images not collected", error=str(error))
            except Exception:  # the outer edge, as above
                log.exception("images not collected")


def _scales(runner: Runner) -> bool:
    """Whether the number of an app's instances may follow what this one says of itself."""
    workload = runner.assignment.workload
    return isinstance(workload, AppSpec) and workload.scale is not UNSET and workload.scale.max is not None
