"""The published policies' scores, computed by hand, and a replay of the demo list."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.scheduling.gpu.demand import PodList, build_pods, typical
from atoll.scheduling.gpu.fleet import ANY_MODEL, Fleet, Nodes, build_fleet
from atoll.scheduling.gpu.packer import NONE, Packer
from atoll.scheduling.gpu.policies import Policy, rounded_gain, simple_score
from atoll.scheduling.gpu.replay import Replay, demo_fleet, demo_pods, replay

HALF = (8000, 0, 1, 500, ANY_MODEL)
WHOLE = (8000, 0, 1, 1000, ANY_MODEL)
CPU_ONLY = (8000, 0, 0, 0, ANY_MODEL)


def score(
    policy: Policy, gpu_milli: list[int], pod: tuple[int, ...], *, cpu_milli: int = 64000, tenants: tuple[int, ...] = (0, 0, 0)
) -> float:
    free = np.array(gpu_milli, dtype=np.int64)
    return simple_score(int(policy), cpu_milli, free, len(free), np.array(tenants, dtype=np.int64), np.array(pod, dtype=np.int64))


def test_dot_product_prefers_the_node_with_less_along_what_is_asked() -> None:
    assert score(Policy.DOT_PRODUCT, [1000] * 4, WHOLE) == 95  # 1 - (0.5·0.0625 + 0.5·0.125) / 2
    assert score(Policy.DOT_PRODUCT, [1000, 0, 0, 0], WHOLE) == 97


def test_best_fit_prefers_the_node_with_less_left() -> None:
    assert score(Policy.BEST_FIT, [1000, 1000], WHOLE) == 71  # 1 - (0.4375 + 0.125) / 2
    assert score(Policy.BEST_FIT, [1000, 0], WHOLE, cpu_milli=8000) == 100


def test_clustering_keeps_kinds_together() -> None:
    alone = score(Policy.CLUSTERING, [1000, 500], HALF, tenants=(1, 0, 0))
    mixed = score(Policy.CLUSTERING, [1000, 500], HALF, tenants=(1, 1, 0))
    empty = score(Policy.CLUSTERING, [1000, 1000], HALF)
    other = score(Policy.CLUSTERING, [1000, 500], HALF, tenants=(0, 1, 0))
    assert (alone, mixed, empty, other) == (95, 70, 43, 20)


def test_packing_prefers_shared_gpus_then_nodes_in_use() -> None:
    assert score(Policy.PACKING, [500, 1000], HALF) == 95
    assert score(Policy.PACKING, [400, 1000], HALF) == 49
    assert score(Policy.PACKING, [400, 1000], WHOLE) == 49
    assert score(Policy.PACKING, [1000, 1000], WHOLE) == 31


def test_pods_without_gpus_are_all_the_same_to_packing_and_clustering() -> None:
    assert score(Policy.PACKING, [500, 1000], CPU_ONLY) == 0
    assert score(Policy.CLUSTERING, [500, 1000], CPU_ONLY) == 0


def test_fgds_score_is_the_logistic_of_the_gain_in_gpus() -> None:
    assert [rounded_gain(gain) for gain in (-1e9, -1000.0, 0.0, 39.0, 41.0, 1000.0)] == [0, 26, 50, 50, 51, 73]


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.RANDOM])
def test_ties_go_to_the_first_node_in_order_and_the_lowest_gpu(policy: Policy) -> None:
    fleet = build_fleet([(f"n{number}", 64000, 100, 2, "T4") for number in range(4)])
    pods = build_pods([HALF])
    placed = Packer(fleet, pods.classes, typical(pods), policy, order=np.array([2, 0, 1, 3])).place(pods.pods)
    assert (placed.node.tolist(), placed.gpus.tolist()) == ([2], [1])


def test_random_ties_use_every_node_and_depend_on_the_seed_alone() -> None:
    def nodes(seed: int) -> list[int]:
        fleet = build_fleet([(f"n{number}", 64000, 100, 2, "T4") for number in range(4)])
        pods = build_pods([CPU_ONLY] * 24)
        return (
            Packer(fleet, pods.classes, typical(pods), Policy.PACKING, random_ties=True, seed=seed).place(pods.pods).node.tolist()
        )

    assert set(nodes(1)) == {0, 1, 2, 3}
    assert nodes(1) == nodes(1) != nodes(2)


def test_what_fits_nowhere_is_left_out_and_takes_nothing() -> None:
    fleet = build_fleet([("n", 64000, 100, 2, "T4")])
    pods = build_pods([(8000, 0, 3, 1000, ANY_MODEL), (8000, 101, 1, 1000, ANY_MODEL), (8000, 0, 1, 1000, 0)])
    placed = Packer(fleet, pods.classes, typical(pods), Policy.ROLLOUT).place(pods.pods)
    assert placed.node.tolist() == [NONE] * 3
    assert fleet.used_gpu_milli == 0


def demo(policy: Policy, *, random_ties: bool) -> Replay:
    """Replay every third pod of the demo list on every third of its nodes."""
    fleet = demo_fleet()
    pods = demo_pods(fleet)
    third = Fleet(fleet.names[::3], fleet.models, Nodes(*(column[::3].copy() for column in fleet.nodes)))
    return replay(third, PodList(pods.classes, pods.pods[::3]), policy, seed=42, random_ties=random_ties)


def test_the_demo_data_is_the_published_cluster() -> None:
    fleet = demo_fleet()
    assert (len(fleet.names), fleet.total_gpu_milli) == (1213, 6_212_000)
    pods = demo_pods(fleet)
    assert (len(pods.pods), int(pods.gpu_milli[pods.pods].sum())) == (8152, 6_086_800)


@pytest.mark.parametrize("random_ties", [False, True])
def test_rollouts_allocate_more_of_the_demo_cluster_than_fgd(random_ties: bool) -> None:
    ours, fgd = demo(Policy.ROLLOUT, random_ties=random_ties), demo(Policy.FGD, random_ties=random_ties)
    assert ours.allocated_percent(130) > fgd.allocated_percent(130) + 0.2
    assert ours.fleet.used_gpu_milli == ours.allocated_gpu_milli[-1]


def test_a_replay_is_the_same_every_time() -> None:
    one, two = demo(Policy.BEST_FIT, random_ties=True), demo(Policy.BEST_FIT, random_ties=True)
    assert np.array_equal(one.placed.node, two.placed.node)
    assert np.array_equal(one.placed.gpus, two.placed.gpus)
    assert one.dropped == (one.placed.node == NONE).sum()
