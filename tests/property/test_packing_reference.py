"""The packer against a slow reference that recomputes everything for every pod, and its safety for any input."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model.errors import Invalid
from atoll.scheduling.gpu.demand import PodList, Target, build_pods, typical
from atoll.scheduling.gpu.fleet import ANY_MODEL, Fleet, build_fleet
from atoll.scheduling.gpu.fragmentation import expected_fragment, fragments
from atoll.scheduling.gpu.packer import NONE, Packer
from atoll.scheduling.gpu.policies import Policy
from atoll.scheduling.gpu.rollout import Futures, draw_futures, expected_leftover

MODELS = ("A10", "T4")
BY_VALUE = (Policy.FGD, Policy.FGD_EXACT, Policy.ROLLOUT, Policy.LEFTOVER)

pods_of_a_list = st.lists(
    st.tuples(
        st.sampled_from([0, 1000, 4000, 7000]),
        st.sampled_from([0, 10, 50]),
        st.sampled_from([(0, 0), (1, 300), (1, 500), (1, 700), (1, 1000), (2, 1000), (3, 1000)]),
        st.sampled_from([ANY_MODEL, 1, 2, 3]),
    ).map(lambda pod: (pod[0], pod[1], *pod[2], pod[3])),
    min_size=1,
    max_size=25,
)
nodes_of_a_fleet = st.lists(
    st.tuples(st.sampled_from([8000, 16000]), st.sampled_from([60, 200]), st.integers(1, 4), st.sampled_from(MODELS)),
    min_size=2,
    max_size=5,
).filter(lambda nodes: {node[3] for node in nodes} == set(MODELS))


def made(nodes: list[tuple[int, int, int, str]]) -> Fleet:
    return build_fleet([(f"n{number}", *node) for number, node in enumerate(nodes)])


class Reference:
    """One pod at a time, every node and GPU tried, every value computed anew; ties to the first in order."""

    def __init__(self, fleet: Fleet, target: Target, policy: Policy, order: list[int], futures: Futures) -> None:
        self.policy, self.target, self.order, self.futures = policy, target, order, futures
        self.cpu = fleet.nodes.cpu_milli.tolist()
        self.memory = fleet.nodes.memory_mib.tolist()
        self.model = fleet.nodes.model.tolist()
        self.free = [row[:count] for row, count in zip(fleet.nodes.gpu_milli.tolist(), fleet.nodes.gpus.tolist(), strict=True)]

    def place(self, pod: list[int]) -> tuple[int, int]:
        best: tuple[float, int, list[int]] | None = None
        for node in self.order:
            at_node: tuple[float, list[int]] | None = None
            for gpus in self.choices(node, pod):
                score = self.score(node, pod, gpus)
                if at_node is None or score > at_node[0] + 1e-6:
                    at_node = (score, gpus)
            if at_node and (best is None or at_node[0] > best[0] + 1e-6):
                best = (at_node[0], node, at_node[1])
        if best is None:
            return NONE, 0
        _, node, gpus = best
        self.cpu[node] -= pod[0]
        self.memory[node] -= pod[1]
        for gpu in gpus:
            self.free[node][gpu] -= pod[3]
        return node, sum(1 << gpu for gpu in gpus)

    def choices(self, node: int, pod: list[int]) -> Iterator[list[int]]:
        if self.cpu[node] < pod[0] or self.memory[node] < pod[1]:
            return
        if pod[2] == 0:
            yield []
        elif pod[4] >> self.model[node] & 1:
            fitting = [gpu for gpu, free in enumerate(self.free[node]) if free >= pod[3]]
            if pod[3] < 1000:
                yield from ([gpu] for gpu in fitting)
            elif len(fitting) >= pod[2]:
                yield fitting[: pod[2]]

    def score(self, node: int, pod: list[int], gpus: list[int]) -> float:
        after = [free - pod[3] if gpu in gpus else free for gpu, free in enumerate(self.free[node])]
        gain = self.lost(node, self.cpu[node], self.free[node]) - self.lost(node, self.cpu[node] - pod[0], after)
        return math.floor(100 / (1 + math.exp(-gain / 1000)) + 1e-9) if self.policy is Policy.FGD else gain

    def lost(self, node: int, cpu: int, free: list[int]) -> float:
        total = 0.0
        if self.policy in (Policy.ROLLOUT, Policy.LEFTOVER):
            leftovers = [self.filled(node, cpu, sorted(free), future) for future in range(len(self.futures.pods))]
            total += sum(leftovers) / len(leftovers)
        if self.policy is Policy.LEFTOVER:
            return total
        for (needs_cpu, _, count, milli, models), share in zip(self.target.pods.tolist(), self.target.share.tolist(), strict=True):
            usable = [each for each in free if each >= milli]
            fits = count > 0 and needs_cpu <= cpu and models >> self.model[node] & 1 and len(usable) >= count
            total += share * (sum(free) - sum(usable) if fits else sum(free))
        return total

    def filled(self, node: int, cpu: int, free: list[int], future: int) -> int:
        free = list(free)
        limit = self.futures.horizon_milli * len(free)
        for pod, offered in zip(self.futures.pods[future].tolist(), self.futures.offered_milli[future].tolist(), strict=True):
            fitting = sorted((each, gpu) for gpu, each in enumerate(free) if each >= pod[3])
            if offered >= limit or pod[0] > cpu or not pod[4] >> self.model[node] & 1 or len(fitting) < pod[2]:
                if offered >= limit:
                    break
                continue
            for _, gpu in fitting[: pod[2]]:
                free[gpu] -= pod[3]
            cpu -= pod[0]
        return sum(free)


@settings(max_examples=60, deadline=None)
@given(nodes_of_a_fleet, pods_of_a_list, st.sampled_from(BY_VALUE), st.integers(0, 100))
def test_the_packer_places_as_the_reference_does(
    nodes: list[tuple[int, int, int, str]], rows: list[tuple[int, int, int, int, int]], policy: Policy, seed: int
) -> None:
    fleet = made(nodes)
    pods = build_pods(rows)
    target = typical(pods)
    order = np.random.default_rng(seed).permutation(len(nodes))
    futures = draw_futures(target, gpus_max=4, futures=4, seed=seed)
    reference = Reference(fleet, target, policy, order.tolist(), futures)
    placed = Packer(fleet, pods.classes, target, policy, order=order, futures=futures).place(pods.pods)
    expected = [reference.place(list(row)) for row in rows]
    assert list(zip(placed.node.tolist(), placed.gpus.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(nodes_of_a_fleet, pods_of_a_list, st.sampled_from(list(Policy)), st.booleans())
def test_no_policy_over_commits_or_breaks_a_rule(
    nodes: list[tuple[int, int, int, str]], rows: list[tuple[int, int, int, int, int]], policy: Policy, random_ties: bool
) -> None:
    fleet = made(nodes)
    before = fleet.copy().nodes
    pods = build_pods(rows)
    placed = packer(fleet, pods, policy, random_ties=random_ties).place(pods.pods)
    cpu, memory, free = before.cpu_milli.copy(), before.memory_mib.copy(), before.gpu_milli.copy()
    for row, node, gpus in zip(rows, placed.node.tolist(), placed.gpus.tolist(), strict=True):
        if node == NONE:
            continue
        taken = [gpu for gpu in range(free.shape[1]) if gpus >> gpu & 1]
        assert len(taken) == row[2]
        assert row[2] == 0 or row[4] >> int(before.model[node]) & 1
        cpu[node] -= row[0]
        memory[node] -= row[1]
        free[node, taken] -= row[3]
        assert cpu[node] >= 0
        assert memory[node] >= 0
        assert (free[node] >= 0).all()
    assert np.array_equal(cpu, fleet.nodes.cpu_milli)
    assert np.array_equal(memory, fleet.nodes.memory_mib)
    assert np.array_equal(free, fleet.nodes.gpu_milli)


@settings(max_examples=40, deadline=None)
@given(nodes_of_a_fleet, pods_of_a_list, st.sampled_from(list(Policy)), st.booleans())
def test_a_pod_is_left_out_only_if_it_fits_nowhere_and_bulk_is_as_one_by_one(
    nodes: list[tuple[int, int, int, str]], rows: list[tuple[int, int, int, int, int]], policy: Policy, random_ties: bool
) -> None:
    bulk, single = made(nodes), made(nodes)
    pods = build_pods(rows)
    placed = packer(bulk, pods, policy, random_ties=random_ties).place(pods.pods)
    one_by_one = packer(single, pods, policy, random_ties=random_ties)
    for index, (pod, row) in enumerate(zip(pods.pods, rows, strict=True)):
        room = Reference(single, typical(pods), policy, list(range(len(nodes))), draw_futures(typical(pods), gpus_max=1, futures=1))
        fits = any(list(room.choices(node, list(row))) for node in range(len(nodes)))
        alone = one_by_one.place(pods.pods[index : index + 1])
        assert (alone.node[0], alone.gpus[0]) == (placed.node[index], placed.gpus[index])
        assert (alone.node[0] != NONE) == fits
        assert pod == pods.pods[index]


@settings(max_examples=40, deadline=None)
@given(nodes_of_a_fleet, pods_of_a_list, pods_of_a_list)
def test_the_gradient_is_the_difference_of_the_whole_clusters_fragmentation(
    nodes: list[tuple[int, int, int, str]],
    rows: list[tuple[int, int, int, int, int]],
    expected: list[tuple[int, int, int, int, int]],
) -> None:
    fleet, target = made(nodes), typical(build_pods(expected))
    pods = build_pods(rows)
    packer = Packer(fleet, pods.classes, target, Policy.FGD_EXACT)
    for pod in pods.pods:
        best = least_growth(fleet, target, pods.classes[pod].tolist())
        before = fragments(fleet, target).sum()
        if packer.place(np.array([pod])).node[0] != NONE:
            assert fragments(fleet, target).sum() - before == pytest.approx(best, abs=1e-5)


def least_growth(fleet: Fleet, target: Target, pod: list[int]) -> float:
    """The least growth of the cluster's fragmentation that any choice for `pod` would bring."""
    room = Reference(fleet, target, Policy.FGD_EXACT, [], draw_futures(target, gpus_max=1, futures=1))
    growths = [-room.score(node, pod, gpus) for node in range(len(fleet.names)) for gpus in room.choices(node, pod)]
    return min(growths, default=math.inf)


@settings(max_examples=60, deadline=None)
@given(st.permutations([1000, 700, 500, 0]), pods_of_a_list, st.sampled_from([0, 4000, 16000]))
def test_a_nodes_value_does_not_depend_on_the_order_of_its_gpus(
    gpu_milli: list[int], rows: list[tuple[int, int, int, int, int]], cpu_milli: int
) -> None:
    target = typical(build_pods(rows))
    futures = draw_futures(target, gpus_max=4, futures=4)
    values = [
        (
            expected_fragment(cpu_milli, np.array(order), 4, 0, target.pods, target.share),
            expected_leftover(cpu_milli, np.array(order), 4, 0, futures),
        )
        for order in (gpu_milli, sorted(gpu_milli))
    ]
    assert values[0] == pytest.approx(values[1])
    assert all(0 <= value <= sum(gpu_milli) + 1e-6 for value in values[0])


def packer(fleet: Fleet, pods: PodList, policy: Policy, *, random_ties: bool) -> Packer:
    target = typical(pods)
    return Packer(
        fleet, pods.classes, target, policy, random_ties=random_ties, seed=5, futures=draw_futures(target, gpus_max=4, futures=4)
    )


def test_an_order_that_is_none_is_refused() -> None:
    fleet = made([(8000, 60, 1, "A10"), (8000, 60, 1, "T4")])
    pods = build_pods([(1, 1, 1, 1000, ANY_MODEL)])
    with pytest.raises(Invalid):
        Packer(fleet, pods.classes, typical(pods), Policy.FGD, order=np.array([0, 0]))
