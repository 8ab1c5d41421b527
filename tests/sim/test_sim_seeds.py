"""The simulator's seeds: all hold, each repeats, and a planted bug is caught."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from atoll.devices.node import NodeDevices
from atoll.model import codec, keys
from atoll.model.devices import GpuDevice, GpuGrant, GpuHealth
from atoll.model.ports.store import (
    RANGE_LIMIT_MAX,
    Compare,
    KeyValue,
    Lease,
    LeaseId,
    Op,
    Put,
    Range,
    Revision,
    Store,
    TxnResult,
    WatchBatch,
)
from atoll.model.records import Instance
from atoll.network.fake import FakeNetwork
from atoll.node.fake import FakeMachine
from atoll.sim.__main__ import report
from atoll.sim.faults import Profile
from atoll.sim.gpus import Rack
from atoll.sim.lives import SimNetwork
from atoll.sim.machine import SimMachine
from atoll.sim.run import run_seed
from atoll.sim.world import Parts

SEEDS = 200
SEEDS_FOR_A_BUG = 25
"""Seeds within which a planted bug must be caught."""
MARKS = (
    "agent killed while running",
    "agent killed while preparing",
    "chaos: agent-crash",
    "chaos: gpu-silent",
    "chaos: gpu-vanish",
    "chaos: machine-restart",
    "chaos: partition",
    "chaos: process-crash",
    "chaos: server-crash",
    "chaos: stall",
    "event: adopted",
    "event: draining",
    "event: gpu-broken",
    "event: gpu-replaced",
    "event: gpu-silent",
    "event: parked",
    "event: promoted",
    "event: woken",
    "event: gpu-vanished",
    "event: node-lost",
    "event: out-of-memory",
    "event: rejected",
    "event: rollout-failed",
    "event: unhealthy",
    "leader: rival's term",
    "line: reply lost",
    "store: outcome unknown",
    "user: acknowledged after retries",
    "watch: late",
)
"""Situations without which 200 seeds would prove little."""


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "atoll.sim", *arguments], capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(300)
def test_200_seeds_hold_and_meet_what_they_should() -> None:
    done = simulate("--seeds", str(SEEDS))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stderr == ""
    met = dict(re.findall(r"^ +\d+  (.+)()$", done.stdout, re.MULTILINE))
    assert [mark for mark in MARKS if mark not in met] == []


def test_one_seed_is_the_same_in_every_process() -> None:
    first, second = simulate("--seed", "11", "--lines", "0"), simulate("--seed", "11", "--lines", "0")
    assert "fingerprint" in first.stdout, first.stderr
    assert first.stdout == second.stdout


def test_a_seed_does_not_depend_on_those_before_it() -> None:
    first = run_seed(12).fingerprint
    run_seed(13)
    assert run_seed(12).fingerprint == first
    assert run_seed(13).fingerprint != first


class Through:
    """A server's store with a bug in it: a subclass changes what is written. Implements `Store`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return ops

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        return await self.store.txn(compare, self.change(then), otherwise)

    async def revision(self) -> Revision:
        return await self.store.revision()

    async def get(self, key: str) -> KeyValue | None:
        return await self.store.get(key)

    async def range(self, prefix: str, *, after: str = "", limit: int = RANGE_LIMIT_MAX, at: Revision | None = None) -> Range:
        return await self.store.range(prefix, after=after, limit=limit, at=at)

    async def put(self, key: str, value: bytes, *, lease: LeaseId = LeaseId(0)) -> Revision:
        return await self.store.put(key, value, lease=lease)

    async def delete(self, key: str) -> Revision:
        return await self.store.delete(key)

    def watch(self, prefix: str, *, start: Revision) -> AsyncIterator[WatchBatch]:
        return self.store.watch(prefix, start=start)

    async def lease_grant(self, ttl_s: float) -> Lease:
        return await self.store.lease_grant(ttl_s)

    async def lease_keep_alive(self, lease: LeaseId) -> None:
        await self.store.lease_keep_alive(lease)

    async def lease_revoke(self, lease: LeaseId) -> None:
        await self.store.lease_revoke(lease)

    async def compact(self, revision: Revision) -> None:
        await self.store.compact(revision)

    async def close(self) -> None: ...


class Forgetful(Through):
    """Acknowledges some changes of apps without writing them."""

    count = 0

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        if any(op.key.startswith(keys.APPS) for op in ops if isinstance(op, Put)):
            self.count += 1
            if self.count % 4 == 0:
                return [op for op in ops if not op.key.startswith(keys.APPS)]
        return ops


class Hasty(Through):
    """Tells instances to stop where they should drain."""

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return [_hurry(op) for op in ops]


def _hurry(op: Op) -> Op:
    if isinstance(op, Put) and op.key.startswith(keys.INSTANCES):
        return Put(op.key, op.value.replace(b'"desired":"drain"', b'"desired":"stop"'), op.lease)
    return op


class Unfenced(Through):
    """Writes for a leader whether it still leads or not."""

    async def txn(self, compare: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        if not any(op.key == keys.LEADER for op in then):
            compare = [one for one in compare if one.key != keys.LEADER]
        return await self.store.txn(compare, then, otherwise)


def rivalry(profile: Profile) -> Profile:
    """Make a run of nothing but hanging disks and servers that stand for leader."""
    return replace(profile, calm=False, span_s=60.0, chaos=("stall", "rival"), chaos_every_s=2.5, latency_s=0.01, apps=3, nodes=2)


class Wavering(Through):
    """Tells some instances to run again when they were to stop."""

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        changed: list[Op] = []
        for op in ops:
            drained = isinstance(op, Put) and op.key.startswith(keys.INSTANCES) and b'"drain_until"' in op.value
            if drained and isinstance(op, Put) and b'"desired":"stop"' in op.value:
                changed.append(Put(op.key, op.value.replace(b'"desired":"stop",', b""), op.lease))
            else:
                changed.append(op)
        return changed


class WithStore(Parts):
    def __init__(self, through: type[Through]) -> None:
        self.through = through

    def store(self, store: Store) -> Store:
        return self.through(store)


class LeakyNetwork(SimNetwork):
    async def detach(self, id: str) -> None:
        """Forget to."""


class LeakyMachine(SimMachine):
    def make_network(self) -> FakeNetwork:
        return LeakyNetwork(self.links, self.life, self._faults, self._story)


class BoastfulMachine(SimMachine):
    """Says that it has more than it has."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._machine = FakeMachine(cpu_milli=8 * self.capacity[0], memory_bytes=8 * self.capacity[1])


class Denying(NodeDevices):
    """Says of every device that it is well."""

    async def inventory(self) -> tuple[GpuDevice, ...]:
        return tuple(replace(each, health=GpuHealth.OK, present=True, reason="") for each in await super().inventory())


class DenyingRack(Rack):
    kind = Denying


class DenyingMachine(SimMachine):
    kind_of_rack = DenyingRack


class Generous(Through):
    """Grants every device of a node to whoever comes: the first that it ever gave."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.first: dict[str, GpuGrant] = {}

    def change(self, ops: Sequence[Op]) -> Sequence[Op]:
        return [self._give(op) if isinstance(op, Put) and op.key.startswith(keys.INSTANCES) else op for op in ops]

    def _give(self, op: Put) -> Put:
        instance = codec.decode(op.value, Instance)
        if not instance.gpus or instance.node is None:
            return op
        grant = self.first.setdefault(instance.node, instance.gpus[0])
        return Put(op.key, codec.encode(replace(instance, gpus=(grant,))), op.lease)


def gpus_fail(profile: Profile) -> Profile:
    """Make a run of GPUs that vanish, break and fall silent."""
    chaos = ("gpu-vanish", "gpu-xid", "gpu-silent", "agent-crash", "machine-restart")
    return replace(profile, calm=False, gpus=True, chaos=chaos, chaos_every_s=4.0, latency_s=0.01)


class WithMachine(Parts):
    def __init__(self, kind: type[SimMachine]) -> None:
        self.kind = kind

    def machine(self, name: str, **rest: Any) -> SimMachine:
        return self.kind(name, **rest)


@pytest.mark.parametrize(
    ("parts", "promise"),
    [
        (WithStore(Forgetful), "acknowledged was"),
        (WithStore(Hasty), "failed without any fault"),
        (WithStore(Wavering), "then to run"),
        (WithMachine(LeakyMachine), "has links"),
        (WithMachine(BoastfulMachine), "runs more than it has"),
    ],
    ids=[
        "a write that is lost",
        "a drain that is skipped",
        "a stop that is taken back",
        "a link that leaks",
        "a node over-committed",
    ],
)
def test_a_planted_bug_is_caught(parts: Parts, promise: str) -> None:
    for seed in range(SEEDS_FOR_A_BUG):
        if any(promise in broken for broken in run_seed(seed, parts).broken):
            return
    pytest.fail(f"{SEEDS_FOR_A_BUG} seeds did not notice")


SHAPES: dict[str, Callable[[Profile], Profile]] = {
    "a bad network": lambda p: replace(p, calm=False, lost=0.15, lost_reply=0.15, store_fails=0.08, slow_watch=0.4, latency_s=0.05),
    "bad runtimes": lambda p: replace(
        p, calm=False, runtime_fails=0.2, chaos=("agent-crash", "process-crash", "machine-restart"), chaos_every_s=3.0
    ),
    "nodes that are given up": lambda p: replace(
        p, calm=False, span_s=200.0, chaos=("partition", "machine-restart", "agent-crash"), chaos_every_s=20.0
    ),
    "history that is forgotten": lambda p: replace(
        p, calm=False, slow_watch=0.5, store_fails=0.05, chaos=("compaction", "server-crash", "ingress-cut"), chaos_every_s=2.0
    ),
    "agents that die all the time": lambda p: replace(
        p, calm=False, chaos=("agent-crash", "stop-instance"), chaos_every_s=1.0, latency_s=0.05
    ),
    "GPUs that fail": gpus_fail,
}
"""Runs with much of one kind of fault; each found bugs that a little of everything did not."""


@pytest.mark.parametrize("kind", SHAPES)
def test_much_of_one_kind_of_fault_does_no_harm(kind: str) -> None:
    for seed in range(5_000, 5_008):
        assert run_seed(seed, shape=SHAPES[kind]).broken == (), f"seed {seed}"


def test_two_leaders_at_once_do_no_harm_but_without_the_fence_they_would() -> None:
    for seed in range(5):
        assert run_seed(seed, shape=rivalry).broken == ()
    for seed in range(SEEDS_FOR_A_BUG):
        if any("over-committed" in broken for broken in run_seed(seed, WithStore(Unfenced), rivalry).broken):
            return
    pytest.fail(f"{SEEDS_FOR_A_BUG} seeds did not notice")


@pytest.mark.parametrize(
    ("parts", "promise"),
    [(WithMachine(DenyingMachine), "have failed"), (WithStore(Generous), "is over-committed: ")],
    ids=["a sick device that is called well", "a device that is given twice"],
)
def test_a_planted_bug_of_gpus_is_caught(parts: Parts, promise: str) -> None:
    for seed in range(SEEDS_FOR_A_BUG):
        if any(promise in broken for broken in run_seed(seed, parts, gpus_fail).broken):
            return
    pytest.fail(f"{SEEDS_FOR_A_BUG} seeds did not notice")


def test_a_failing_seed_says_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_seed(3, WithMachine(LeakyMachine))
    assert outcome.broken
    assert any("BROKEN" in line for line in outcome.story)
    assert any("a process starts" in line for line in outcome.story)
    report(outcome)
    assert "python -m atoll.sim --seed 3" in capsys.readouterr().out
