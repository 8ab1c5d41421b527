"""The agent: adopts what an earlier one left, then follows its assignments, with or without the control plane."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import structlog
from msgspec.structs import replace

from atoll import __version__
from atoll.model.devices import GpuGrant
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.clock import Clock
from atoll.model.ports.control_plane import AssignmentBatch, Channel, ControlPlane, StreamRequest
from atoll.model.ports.devices import Devices, ForeignDevices
from atoll.model.ports.images import Images
from atoll.model.ports.network import Network
from atoll.model.ports.runtime import Runtime
from atoll.model.records import Assignment, Capacity, Instance, Node, OwnerKind, Severity, Status
from atoll.model.spec import JobSpec, RuntimeName
from atoll.model.states import Desired, Phase, advance
from atoll.node.beating import Beating
from atoll.node.contact import Contact
from atoll.node.cutoff import CONTACT_LOOK_S, overdue
from atoll.node.directories import Directories
from atoll.node.gpus import Gpus
from atoll.node.health import NetworkProber
from atoll.node.logs import FileLogs
from atoll.node.metrics import NetworkScraper
from atoll.node.prefetch import Prefetch
from atoll.node.record import Entry, LocalRecord, SqliteRecord
from atoll.node.recovery import recover
from atoll.node.report import RETRY_MAX_S, Reporter, retry_delay
from atoll.node.runner import Runner, new_entry
from atoll.node.snapshots import Snapshots
from atoll.node.spares import Spares
from atoll.node.streams import serve_stream
from atoll.node.tools import Logs, Machine, Prober, Scraper, Tools
from atoll.node.transitions import Reached, Removed, State, Wanted, status_of
from atoll.node.usage import LinuxMachine, architecture
from atoll.node.vitals import Vitals
from atoll.node.volumes_trouble import tell_troubles

SILENCE_S = 30.0
"""Without a batch for so long (an empty one is due every 10 s) the connection counts as broken."""
REDIAL_MAX_S = 1.0
"""The longest wait before the first `REDIALS_QUICK` tries: who waits for a shell waits no longer than a restart takes."""
REDIALS_QUICK = 60
LASTED_S = 5.0
"""A connection that lasted so long was a good one: the next try comes at once."""
STREAMS_MAX = 256
"""Live streams (exec, logs, files) at a time."""
STOP_ALL_S = 20.0
"""How long an orderly end of the node waits for its instances."""
STOP_POLL_S = 0.02
CLOSE_S = 5.0
"""Deadline of letting go of one part at the end."""

T = TypeVar("T")
log = structlog.get_logger()


class Agent:
    """Runs one node. `run` returns never; cancel it, and everything goes on running for the next agent to adopt.

    From `record` on, parameters have real implementations as defaults; the simulator and tests pass fakes.
    """

    def __init__(
        self,
        *,
        node: str,
        control: ControlPlane,
        runtimes: Sequence[Runtime],
        images: Images,
        network: Network,
        clock: Clock,
        random: random.Random,
        data: Path,
        site: str = "local",
        region: str = "local",
        labels: dict[str, str] | None = None,
        taints: Sequence[str] = (),
        address: str = "",
        record: LocalRecord | None = None,
        logs: Logs | None = None,
        prober: Prober | None = None,
        scraper: Scraper | None = None,
        machine: Machine | None = None,
        devices: Devices | None = None,
        foreign: ForeignDevices | None = None,
        arch: str | None = None,
        beating: Beating | None = None,
        contact: Contact | None = None,
    ) -> None:
        self._node = node
        self._control = control
        self._offered = tuple(runtimes)
        self._images = images
        self._network = network
        self._clock = clock
        self._random = random
        self._directories = Directories(data)
        self._snapshots = Snapshots(self._directories.snapshots)
        self._record = record
        self._logs = logs or FileLogs(self._directories, clock)
        self._prober = prober or NetworkProber()
        self._scraper = scraper or NetworkScraper()
        self._machine = machine or LinuxMachine(data)
        self._description = Node(
            name=node,
            site=site,
            region=region,
            capacity=Capacity(cpu_milli=0, memory_bytes=0, disk_bytes=0),
            labels=dict(labels or {}),
            taints=tuple(taints),
            arch=arch or architecture(),
            version=__version__,
            address=address,
        )
        self._reporter = Reporter(node, control, clock, random)
        self._beating = beating
        self._contact = beating.contact if beating is not None else contact or Contact(self._directories.contact)
        self._foreign = foreign
        self._gpus: Gpus | None = None
        if devices is not None:
            file = self._directories.gpus
            self._gpus = Gpus(
                devices,
                node=node,
                reporter=self._reporter,
                clock=clock,
                holders=self._holders,
                file=file,
                groups=self._machine.groups,
                runtimes=lambda: tuple(self._runtimes),
            )
        self._prefetch = Prefetch(node, images, self._machine, clock, self._reporter, self._preparing)
        self._runtimes: dict[RuntimeName, Runtime] = {}
        self._streams = 0
        self._spares = Spares(node, control, random, spawn=self._spawn, serve=self._serve, wanted=self._has_sandbox)
        self._reached = asyncio.Event()
        """Pulsed when the control plane is found again: whoever waits to dial it need wait no longer."""
        self._unread: dict[str, Status] = {}
        """Of assigned instances that this version does not understand: that they have failed, and why."""
        self._closing = False
        self._group: asyncio.TaskGroup | None = None
        self._tools: Tools | None = None
        self._vitals: Vitals | None = None
        self.runners: dict[str, Runner] = {}
        """By instance id; for reading from outside."""

    async def run(self) -> None:
        """Raises Corrupt for a damaged local record; nothing else of the machine or the control plane ends it."""
        self._directories.make()
        record = self._record or SqliteRecord(self._directories.record)
        try:
            await self._probe_runtimes()
            self._tools = Tools(
                node=self._node,
                control=self._control,
                runtimes=self._runtimes,
                images=self._images,
                network=self._network,
                clock=self._clock,
                record=record,
                logs=self._logs,
                prober=self._prober,
                scraper=self._scraper,
                directories=self._directories,
                reporter=self._reporter,
                gpus=self._gpus,
                foreign=self._foreign,
                peer_digest=self._peer_digest,
            )
            self._vitals = Vitals(
                self._description, self._tools, self._machine, self.runners, self._prefetch, self._contact, self._beating
            )
            self._contact.load(self._clock.monotonic())
            entries = record.load()
            async with asyncio.TaskGroup() as self._group:
                for entry, event in await recover(entries, self._tools, self._random):
                    self._begin(entry, recorded=True).handle(event)
                self._spawn(self._reporter.run())
                self._spawn(self._follow(self._follow_assignments, "assignments"))
                self._spawn(self._follow(self._follow_streams, "tunnel"))
                self._spawn(self._vitals.beat())
                self._spawn(self._watch_contact())
                self._spawn(self._vitals.collect())
                self._spawn(self._prefetch.run())
                self._spawn(tell_troubles(self._node, self._images, self._reporter))
                if self._gpus is not None:
                    self._gpus.announce = self._vitals.register
                    for work in (self._gpus.recover_later(self._held), self._gpus.listen(), self._gpus.watch()):
                        self._spawn(work)
        finally:
            for runner in self.runners.values():
                runner.let_go()
            self._reporter.let_go()
            await self._let_go(record)

    async def stop_instances(self, deadline_s: float = STOP_ALL_S) -> None:
        """Tell every instance to stop and wait until they have, and have been reported; while `run` runs, once, before it ends.

        New assignments are not taken up any more. Returns after `deadline_s` whatever then still runs, which the next agent adopts.
        """
        self._closing = True
        self._prefetch.want(())
        for runner in self.runners.values():
            runner.handle(Wanted(Desired.STOP))
        deadline = self._clock.monotonic() + deadline_s
        while self._clock.monotonic() < deadline:
            if self._reporter.idle and all(runner.settled for runner in self.runners.values()):
                return
            await asyncio.sleep(STOP_POLL_S)
        left = [runner.id for runner in self.runners.values() if not runner.settled]
        log.warning("not all has ended", node=self._node, instances=left)

    async def _probe_runtimes(self) -> None:
        for runtime in self._offered:
            try:
                version = await runtime.probe()
            except AtollError as error:
                log.warning("runtime not usable", runtime=runtime.name, why=str(error), mend=error.mend)
            else:
                log.info("runtime usable", runtime=runtime.name, version=version)
                self._runtimes[runtime.name] = runtime

    async def _let_go(self, record: LocalRecord) -> None:
        parts: list[Runtime | Network | Gpus] = [*self._runtimes.values(), self._network]
        if self._gpus is not None:
            parts.append(self._gpus)
        for part in parts:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await part.close()
            except (AtollError, TimeoutError) as error:
                log.warning("not closed", part=type(part).__name__, error=str(error))
        self._logs.shut()
        record.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._group is None:
            raise AssertionError("nothing is spawned before run")
        try:
            return self._group.create_task(work)
        except RuntimeError:
            # The agent is ending, and a timer came up before it was stopped: nothing is begun any more.
            work.close()
            return asyncio.get_running_loop().create_task(_nothing())

    def _begin(self, entry: Entry, *, recorded: bool) -> Runner:
        if self._tools is None:
            raise AssertionError("no instance begins before run")
        runner = Runner(entry, self._tools, self._spawn, recorded=recorded)
        self.runners[runner.id] = runner
        self._spawn(self._run_instance(runner))
        self._spares.look()
        return runner

    async def _run_instance(self, runner: Runner) -> None:
        await runner.run()
        self.runners.pop(runner.id, None)
        self._spares.look()

    async def _follow(self, follow: Callable[[], Awaitable[None]], what: str) -> None:
        """Keep a stream from the control plane open, with growing waits between tries; it succeeded if it lasted."""
        failures = 0
        while True:
            began, spread_s = self._clock.monotonic(), 0.0
            try:
                await follow()
                raise Unavailable("the control plane ended the stream")
            except (AtollError, TimeoutError) as error:
                if self._clock.monotonic() - began > LASTED_S:
                    failures = 0
                    # The server may have died, and thousands of agents with it have the same to do now.
                    spread_s = self._random.uniform(0.0, self._beating.spread_s) if self._beating is not None else 0.0
                log.warning("connection lost", what=what, node=self._node, error=str(error) or "silence", failures=failures)
            except Exception:
                log.exception("connection failed", what=what, node=self._node)
            try:
                max_s = REDIAL_MAX_S if failures < REDIALS_QUICK else RETRY_MAX_S
                async with asyncio.timeout(spread_s + retry_delay(failures, self._random, max_s)):
                    await self._reached.wait()
            except TimeoutError:
                pass
            failures += 1

    async def _follow_assignments(self) -> None:
        if self._vitals is None:
            raise AssertionError("nothing is followed before run")
        await self._vitals.register()
        async for batch in _with_silence(self._control.assignments(self._node), SILENCE_S):
            self._apply(batch)

    def _apply(self, batch: AssignmentBatch) -> None:
        if self._closing:
            return
        for assignment in batch.put:
            self._assign(assignment)
        self._tell_unread(batch)
        for id, desired in batch.kept.items():
            if (runner := self.runners.get(id)) is not None:
                instance = replace(runner.assignment.instance, desired=advance(runner.assignment.instance.desired, desired))
                runner.update(replace(runner.assignment, instance=instance))
        gone = list(batch.removed)
        if batch.complete:
            wanted = {assignment.instance.id for assignment in batch.put} | batch.kept.keys()
            gone += [id for id in self.runners if id not in wanted]
        for id in gone:
            runner = self.runners.get(id)
            if runner is not None:
                runner.handle(Removed())
        if batch.complete or batch.prefetch is not None:
            self._prefetch.want(batch.prefetch or ())
        if batch.complete:
            self._reached.set()
            self._reached.clear()
            if self._beating is not None:
                self._beating.reached()
            # What was said while the connection was away may have been lost, or overruled by "lost".
            for runner in self.runners.values():
                runner.handle(Reached())
                if not runner.state.removed:
                    runner.report()

    def _tell_unread(self, batch: AssignmentBatch) -> None:
        """Say once of each assignment that it is not understood, and why; one of which nothing runs here has failed by that."""
        known, still = self._unread, {one.instance for one in batch.unread}
        over = known if batch.complete else (*(assignment.instance.id for assignment in batch.put), *batch.removed)
        for id in [id for id in over if id in known and id not in still]:
            del known[id]
            if id not in self.runners:
                self._reporter.forget(id)
        for one in batch.unread:
            text = f"this node's agent does not understand what it is to run: {one.why}; update it"
            status = known.get(one.instance)
            if status is None or status.message != text:
                self._reporter.event(one.project, f"instance/{one.instance}", "assignment-unread", text, Severity.WARNING)
                failed = State(phase=Phase.FAILED, phase_at=self._clock.now(), message=text)
                status = status_of(failed, instance=one.instance, project=one.project, node=self._node)
            known[one.instance] = status
            if one.instance not in self.runners:
                self._reporter.status(status)

    async def _watch_contact(self) -> None:
        """Stop what must not run twice once nobody is known to have heard this node for too long; for ever."""
        while True:
            now = self._clock.monotonic()
            for runner, limit_s in overdue(self.runners.values(), self._contact.cut_off_s(now)):
                runner.handle(Wanted(Desired.STOP))
                text = f"stopped: this node has had no contact to the leader for {limit_s:g} s, and it must not run twice"
                self._reporter.event(runner.project, f"instance/{runner.id}", "stopped-cut-off", text, Severity.WARNING)
            self._contact.save()
            await asyncio.sleep(CONTACT_LOOK_S)

    def _preparing(self) -> bool:
        return any(runner.state.phase in (Phase.PREPARING, Phase.STARTING) for runner in self.runners.values())

    def _peer_digest(self, instance: Instance, volume: str | None) -> str | None:
        if instance.owner_kind is not OwnerKind.APP:
            return None  # a job of the same name may be another
        release = (instance.owner_kind, instance.project, instance.owner, instance.release)
        for runner in self.runners.values():
            other, state = runner.assignment.instance, runner.state
            same = (other.owner_kind, other.project, other.owner, other.release) == release
            digest = state.image_digest if volume is None else state.volume_digests.get(volume)
            if same and digest is not None and not state.removed:
                return digest
        return None

    def _held(self) -> dict[str, tuple[GpuGrant, ...]]:
        instances = [runner.assignment.instance for runner in self.runners.values() if not runner.state.phase.final]
        return {instance.id: instance.gpus for instance in instances if instance.gpus}

    def _holders(self, device: str) -> list[Instance]:
        found = []
        for runner in self.runners.values():
            held = {grant.device for grant in runner.assignment.instance.gpus}
            if not runner.state.phase.final and (device in held or (held and not device)):
                found.append(runner.assignment.instance)
        return found

    def _assign(self, assignment: Assignment) -> None:
        runner = self.runners.get(assignment.instance.id)
        if runner is not None:
            runner.update(assignment)
            return
        if self._contact.at is None:
            self._contact.prove(self._clock.monotonic())  # who gives us work has heard of us
        self._begin(new_entry(assignment), recorded=False).handle(Wanted(assignment.instance.desired, assignment.instance.standby))

    async def _follow_streams(self) -> None:
        async for request in self._control.stream_requests(self._node):
            self._spawn(self._serve(request))

    def _has_sandbox(self) -> bool:
        workloads = (runner.assignment.workload for runner in self.runners.values())
        return not self._closing and any(isinstance(workload, JobSpec) and workload.sandbox for workload in workloads)

    async def _serve(self, request: StreamRequest, channel: Channel | None = None) -> None:
        self._streams += 1
        try:
            await serve_stream(
                request,
                self._control,
                self._node,
                self.runners.get(request.instance),
                self._logs,
                gpus=self._gpus,
                snapshots=self._snapshots,
                full=self._streams > STREAMS_MAX,
                channel=channel,
            )
        except Exception:
            log.exception("stream failed", kind=request.kind, instance=request.instance)
        finally:
            self._streams -= 1


async def _with_silence(items: AsyncIterator[T], silence_s: float) -> AsyncIterator[T]:
    """Yield from `items`; raise TimeoutError when none comes for so long."""
    iterator = aiter(items)
    try:
        while True:
            async with asyncio.timeout(silence_s):
                try:
                    item = await anext(iterator)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def _nothing() -> None:
    """Stands for work of an agent that is ending."""
