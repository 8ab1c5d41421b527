"""Places pods one after the other on a fleet by a policy, and remembers every score until its node changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atoll.model.errors import Invalid
from atoll.scheduling.compiled import compiled
from atoll.scheduling.gpu.demand import CPU, GPUS, MEMORY, MILLI, MODELS, Target
from atoll.scheduling.gpu.fleet import GPU_MILLI, Fleet, Ints, Nodes
from atoll.scheduling.gpu.fragmentation import Floats, expected_fragment
from atoll.scheduling.gpu.policies import Policy, rounded_gain, simple_score
from atoll.scheduling.gpu.rollout import Futures, draw_futures, expected_leftover

GPUS_MAX = 62
"""GPUs of one node: a choice of them is one bit each."""

VALUES_MAX = 1 << 20
"""Values of node states that are remembered (16 bytes each); a newer one takes an older one's place."""

NONE = -1
"""In place of a node: the pod fits nowhere."""

_GAIN_TOLERANCE = 1e-6
"""Gains (thousandths of a GPU) closer than this are a tie: sums of floats are not exact."""


class _Scores(NamedTuple):
    """What is known of (class, node) as of the node's version."""

    score: Floats
    gpus: Ints
    """Bits of the GPUs that the pod would get; NONE: it does not fit."""
    version: Ints


class _Values(NamedTuple):
    """What a node's state is worth: of every node now, and of states met before, by a hash of the state."""

    node: Floats
    node_version: Ints
    key: NDArray[np.uint64]
    value: Floats


class _Rule(NamedTuple):
    policy: int
    random_ties: bool
    typical_pods: Ints
    typical_share: Floats
    futures: Futures


@dataclass(frozen=True)
class Placed:
    """For every pod its node's row (NONE where it did not fit), and the bits of the GPUs that it got."""

    node: Ints
    gpus: Ints


class Packer:
    """Places pods of `classes` on `fleet`, whose columns it changes. Deterministic for its arguments.

    `target` is what the fragmentation and rollout policies expect of the future. Ties go to the node that is first in
    `order` (rows of nodes; by default their order of name) and the lowest GPU, or, with `random_ties`, to any of them.
    Raises Invalid: a node has more GPUs than GPUS_MAX, or `order` does not name every node once.
    """

    def __init__(
        self,
        fleet: Fleet,
        classes: Ints,
        target: Target,
        policy: Policy,
        *,
        order: Ints | None = None,
        random_ties: bool = False,
        seed: int = 0,
        futures: Futures | None = None,
    ) -> None:
        count, most = fleet.nodes.gpu_milli.shape
        if most > GPUS_MAX:
            raise Invalid(f"a node of {most} GPUs: the most is {GPUS_MAX}")
        self._order = np.arange(count) if order is None else np.asarray(order, dtype=np.int64)
        if not np.array_equal(np.sort(self._order), np.arange(count)):
            raise Invalid("the order must name every node once")
        self._nodes = fleet.nodes
        self._classes = np.ascontiguousarray(classes, dtype=np.int64)
        shape = (len(self._classes), count)
        self._scores = _Scores(np.zeros(shape), np.full(shape, NONE, dtype=np.int64), np.full(shape, -1, dtype=np.int64))
        self._values = _Values(
            np.zeros(count), np.full(count, -1, dtype=np.int64), np.zeros(VALUES_MAX, dtype=np.uint64), np.zeros(VALUES_MAX)
        )
        futures = futures or draw_futures(target, gpus_max=most)
        self._rule = _Rule(int(policy), random_ties, target.pods, target.share, futures)
        self._chance = np.array([seed * 2 + 1], dtype=np.uint64)

    def place(self, pods: Ints) -> Placed:
        """Place pods (rows of `classes`) in order, each before the next is looked at. What does not fit is left out."""
        node = np.full(len(pods), NONE, dtype=np.int64)
        gpus = np.zeros(len(pods), dtype=np.int64)
        _place(
            self._nodes,
            self._classes,
            np.asarray(pods),
            self._order,
            self._rule,
            self._scores,
            self._values,
            self._chance,
            node,
            gpus,
        )
        return Placed(node, gpus)


@compiled
def _place(
    nodes: Nodes,
    classes: Ints,
    pods: Ints,
    order: Ints,
    rule: _Rule,
    scores: _Scores,
    values: _Values,
    chance: NDArray[np.uint64],
    chosen: Ints,
    taken: Ints,
) -> None:
    random_ties = rule.random_ties or rule.policy == 0
    for index in range(len(pods)):
        c = pods[index]
        best = NONE
        ties = 0
        for n in order:
            if scores.version[c, n] != nodes.version[n]:
                scores.version[c, n] = nodes.version[n]
                scores.gpus[c, n] = NONE
                if _fits(nodes, n, classes[c]):
                    scores.score[c, n], scores.gpus[c, n] = _score(nodes, n, classes[c], rule, values, chance)
            if scores.gpus[c, n] == NONE:
                continue
            ahead = 1.0 if best == NONE else scores.score[c, n] - scores.score[c, best]
            if ahead > _GAIN_TOLERANCE:
                best = n
                ties = 1
            elif random_ties and ahead > -_GAIN_TOLERANCE:
                ties += 1
                if _below(chance, ties) == 0:
                    best = n
        if best != NONE:
            chosen[index] = best
            taken[index] = scores.gpus[c, best]
            _take(nodes, best, classes[c], taken[index])


@compiled
def _fits(nodes: Nodes, n: int, pod: Ints) -> bool:
    if nodes.cpu_milli[n] < pod[CPU] or nodes.memory_mib[n] < pod[MEMORY]:
        return False
    if pod[GPUS] == 0:
        return True
    if not (pod[MODELS] >> nodes.model[n]) & 1:
        return False
    enough = 0
    for g in range(nodes.gpus[n]):
        enough += nodes.gpu_milli[n, g] >= pod[MILLI]
    return bool(enough >= pod[GPUS])


@compiled
def _take(nodes: Nodes, n: int, pod: Ints, gpus: int) -> None:
    nodes.cpu_milli[n] -= pod[CPU]
    nodes.memory_mib[n] -= pod[MEMORY]
    for g in range(nodes.gpus[n]):
        if (gpus >> g) & 1:
            nodes.gpu_milli[n, g] -= pod[MILLI]
    if pod[GPUS] > 0:
        nodes.tenants[n, 0 if pod[MILLI] < GPU_MILLI else pod[GPUS]] += 1
    nodes.version[n] += 1


@compiled
def _score(nodes: Nodes, n: int, pod: Ints, rule: _Rule, values: _Values, chance: NDArray[np.uint64]) -> tuple[float, int]:
    """Return the score of node `n`, which has room for `pod`, and the bits of the GPUs that the pod should get there."""
    by_value = rule.policy >= 5
    if pod[GPUS] != 1 or pod[MILLI] == GPU_MILLI:
        whole = _whole_gpus(nodes, n, pod)
        if by_value:
            return _gain(nodes, n, pod, whole, rule, values), whole
        return simple_score(rule.policy, nodes.cpu_milli[n], nodes.gpu_milli[n], nodes.gpus[n], nodes.tenants[n], pod), whole
    best = -1
    best_score = 0.0
    ties = 1
    for g in range(nodes.gpus[n]):
        free = nodes.gpu_milli[n, g]
        if free < pod[MILLI]:
            continue
        score = 0.0 if rule.policy == 0 else -float(free)
        if by_value:
            score = _gain(nodes, n, pod, 1 << g, rule, values)
        if best < 0 or score > best_score + _GAIN_TOLERANCE:
            best = g
            best_score = score
            ties = 1
        elif (rule.random_ties or rule.policy == 0) and score > best_score - _GAIN_TOLERANCE:
            ties += 1
            if _below(chance, ties) == 0:
                best = g
    if not by_value:
        best_score = simple_score(rule.policy, nodes.cpu_milli[n], nodes.gpu_milli[n], nodes.gpus[n], nodes.tenants[n], pod)
    return best_score, 1 << best


@compiled
def _whole_gpus(nodes: Nodes, n: int, pod: Ints) -> int:
    chosen = 0
    missing = pod[GPUS]
    for g in range(nodes.gpus[n]):
        if missing > 0 and nodes.gpu_milli[n, g] == GPU_MILLI:
            chosen |= 1 << g
            missing -= 1
    return chosen


@compiled
def _gain(nodes: Nodes, n: int, pod: Ints, gpus: int, rule: _Rule, values: _Values) -> float:
    """Return by how much less of the node would be lost, if `pod` took `gpus`."""
    count = nodes.gpus[n]
    if values.node_version[n] != nodes.version[n]:
        values.node_version[n] = nodes.version[n]
        values.node[n] = _lost(nodes.cpu_milli[n], nodes.gpu_milli[n], count, nodes.model[n], rule, values)
    after = nodes.gpu_milli[n].copy()
    for g in range(count):
        if (gpus >> g) & 1:
            after[g] -= pod[MILLI]
    gain = values.node[n] - _lost(nodes.cpu_milli[n] - pod[CPU], after, count, nodes.model[n], rule, values)
    return rounded_gain(gain) if rule.policy == 5 else gain


@compiled
def _lost(cpu_milli: int, gpu_milli: Ints, gpus: int, model: int, rule: _Rule, values: _Values) -> float:
    """Return what of the node's free GPUs counts as lost; states that differ in the order of GPUs are one."""
    ordered = np.sort(gpu_milli[:gpus])
    key = np.uint64(0x9E3779B97F4A7C15)
    key = _mixed(key, np.uint64(cpu_milli))
    key = _mixed(key, np.uint64(model * 64 + gpus))
    for milli in ordered:
        key = _mixed(key, np.uint64(milli))
    slot = np.int64(key & np.uint64(VALUES_MAX - 1))
    if values.key[slot] == key:
        return float(values.value[slot])
    lost = 0.0
    if rule.policy != 8:
        lost += expected_fragment(cpu_milli, ordered, gpus, model, rule.typical_pods, rule.typical_share)
    if rule.policy >= 7:
        lost += expected_leftover(cpu_milli, ordered, gpus, model, rule.futures)
    values.key[slot] = key
    values.value[slot] = lost
    return lost


@compiled
def _mixed(key: np.uint64, word: np.uint64) -> np.uint64:
    """One round of a multiply-and-shift hash: 64 bits, so that two of a million states share one once in 30 million runs."""
    key = (key ^ word) * np.uint64(0xFF51AFD7ED558CCD)
    return key ^ (key >> np.uint64(32))


@compiled
def _below(chance: NDArray[np.uint64], limit: int) -> int:
    """Return a random whole number below `limit` (xorshift64*)."""
    word = chance[0]
    word ^= word >> np.uint64(12)
    word ^= word << np.uint64(25)
    word ^= word >> np.uint64(27)
    chance[0] = word
    return int((word * np.uint64(0x2545F4914F6CDD1D) >> np.uint64(33)) % np.uint64(limit))
