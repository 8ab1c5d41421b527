"""What a node's free GPUs are worth: FGD's expected fragment and the rollouts' expected leftover, computed by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest

from atoll.model.errors import Invalid
from atoll.scheduling.gpu.demand import Target, arrivals, build_pods, pod_row, read_pods, typical
from atoll.scheduling.gpu.fleet import ANY_MODEL, Fleet, build_fleet, read_fleet
from atoll.scheduling.gpu.fragmentation import expected_fragment, fragments
from atoll.scheduling.gpu.rollout import Futures, draw_futures, expected_leftover

CPU_ONLY = (4000, 0, 0, 0, ANY_MODEL)
HALF = (4000, 0, 1, 500, ANY_MODEL)
WHOLE = (8000, 0, 1, 1000, ANY_MODEL)
PAIR = (16000, 0, 2, 1000, ANY_MODEL)


def target(*pods: tuple[float, tuple[int, int, int, int, int]]) -> Target:
    return Target(np.array([pod for _, pod in pods], dtype=np.int64), np.array([share for share, _ in pods]))


def fragment(cpu_milli: int, gpu_milli: list[int], expected: Target, model: int = 0) -> float:
    return expected_fragment(cpu_milli, np.array(gpu_milli, dtype=np.int64), len(gpu_milli), model, expected.pods, expected.share)


def futures(*sequences: list[tuple[int, int, int, int, int]], horizon_milli: int = 1_000_000) -> Futures:
    pods = np.array(sequences, dtype=np.int64)
    demand = pods[:, :, 2] * pods[:, :, 3]
    return Futures(pods, np.cumsum(demand, axis=1) - demand, horizon_milli, 0)


def leftover(cpu_milli: int, gpu_milli: list[int], drawn: Futures, model: int = 0) -> float:
    return expected_leftover(cpu_milli, np.array(gpu_milli, dtype=np.int64), len(gpu_milli), model, drawn)


def test_a_full_node_has_no_fragment() -> None:
    assert fragment(64000, [0, 0], target((1.0, WHOLE))) == 0


def test_what_a_pod_can_use_is_no_fragment() -> None:
    assert fragment(64000, [1000, 500], target((1.0, HALF))) == 0


def test_gpus_too_full_for_the_pod_are_its_fragment() -> None:
    assert fragment(64000, [1000, 300, 400], target((1.0, HALF))) == 700


def test_all_is_lost_to_a_pod_that_lacks_gpus_cpu_or_its_model() -> None:
    assert fragment(64000, [1000, 900], target((1.0, PAIR))) == 1900
    assert fragment(7999, [1000, 900], target((1.0, WHOLE))) == 1900
    assert fragment(64000, [1000, 900], target((1.0, (8000, 0, 1, 1000, 0b10)))) == 1900
    assert fragment(64000, [1000, 900], target((1.0, (8000, 0, 1, 1000, 0b10))), model=1) == 900


def test_all_is_lost_to_a_pod_without_gpus() -> None:
    assert fragment(64000, [1000, 900], target((1.0, CPU_ONLY))) == 1900


def test_fragment_is_the_mean_over_the_expected_pods() -> None:
    mixed = target((0.5, HALF), (0.3, WHOLE), (0.2, CPU_ONLY))
    assert fragment(64000, [1000, 300], mixed) == pytest.approx(0.5 * 300 + 0.3 * 300 + 0.2 * 1300)


def test_fragments_are_those_of_every_node() -> None:
    fleet = build_fleet([("b", 64000, 1, 1, "T4"), ("a", 2000, 1, 2, "T4")])
    assert fragments(fleet, target((1.0, WHOLE))).tolist() == [2000, 0]


def test_leftover_is_what_a_future_leaves() -> None:
    assert leftover(64000, [1000, 1000], futures([HALF, WHOLE, WHOLE])) == 500
    assert leftover(64000, [1000, 1000], futures([WHOLE, HALF, HALF])) == 0


def test_a_part_goes_to_the_fullest_gpu_with_room() -> None:
    assert leftover(64000, [1000, 500], futures([HALF, WHOLE])) == 0


def test_cpu_that_runs_out_strands_gpus() -> None:
    assert leftover(8000, [1000, 1000, 1000], futures([WHOLE, WHOLE, WHOLE])) == 2000


def test_leftover_is_the_mean_over_futures() -> None:
    assert leftover(64000, [1000], futures([HALF, CPU_ONLY], [WHOLE, WHOLE])) == 250


def test_a_future_ends_at_its_horizon() -> None:
    assert leftover(64000, [1000, 1000], futures([HALF, HALF, HALF, HALF], horizon_milli=500)) == 1000


def test_pods_of_other_models_pass_by() -> None:
    assert leftover(64000, [1000], futures([(8000, 0, 1, 1000, 0b10), HALF])) == 500


def test_futures_reach_the_horizon_and_are_the_same_every_time() -> None:
    drawn = draw_futures(target((0.5, HALF), (0.5, CPU_ONLY)), gpus_max=4, futures=8, horizon=2.0)
    assert (drawn.offered_milli[:, -1] >= 4000).all()
    again = draw_futures(target((0.5, HALF), (0.5, CPU_ONLY)), gpus_max=4, futures=8, horizon=2.0)
    assert np.array_equal(drawn.pods, again.pods)


def test_futures_without_gpu_demand_are_short() -> None:
    assert draw_futures(target((1.0, CPU_ONLY)), gpus_max=8).pods.shape[1] == 1


def test_typical_pods_are_the_most_frequent_ones() -> None:
    pods = build_pods([HALF] * 90 + [WHOLE] * 8 + [PAIR] * 2)
    kept = typical(pods)
    assert kept.pods.tolist() == [list(HALF), list(WHOLE)]
    assert kept.share.tolist() == pytest.approx([90 / 98, 8 / 98])


def test_arrivals_hold_the_list_and_end_at_the_load() -> None:
    pods = build_pods([HALF, WHOLE, CPU_ONLY])
    sequence = arrivals(pods, capacity_gpu_milli=10_000, load=1.3, seed=1)
    demand = pods.gpu_milli[sequence].sum()
    assert sorted(sequence[:3].tolist()) == [0, 1, 2]
    assert 12_000 <= demand <= 13_000
    assert np.array_equal(sequence, arrivals(pods, capacity_gpu_milli=10_000, load=1.3, seed=1))


def test_arrivals_without_gpu_demand_are_refused() -> None:
    with pytest.raises(Invalid):
        arrivals(build_pods([CPU_ONLY]), capacity_gpu_milli=1000, load=1.3, seed=1)


NODES = "sn,cpu_milli,memory_mib,gpu,model\nn1,64000,1000,2,T4\nn0,32000,1000,0,\nn2,64000,1000,4,A10\n"


def openb_fleet() -> Fleet:
    return read_fleet(io.StringIO(NODES))


def test_a_node_list_is_read_without_nodes_that_have_no_gpu() -> None:
    fleet = openb_fleet()
    assert fleet.names == ("n1", "n2")
    assert fleet.total_gpu_milli == 6000
    assert fleet.used_gpu_milli == 0


def test_a_pod_list_is_read_in_order_of_name_with_or_without_models() -> None:
    fleet = openb_fleet()
    pods = read_pods(io.StringIO("name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\nb,1,2,0,7,\na,1,2,1,300,T4|XX\n"), fleet)
    assert pods.classes[pods.pods].tolist() == [[1, 2, 1, 300, 1 << fleet.models.index("T4")], [1, 2, 0, 0, ANY_MODEL]]
    short = read_pods(io.StringIO("name,cpu_milli,memory_mib,num_gpu,gpu_milli\na,1,2,2,1000\n"), fleet)
    assert short.classes.tolist() == [[1, 2, 2, 1000, ANY_MODEL]]


@pytest.mark.parametrize(
    "row",
    [
        "a,nan,2,1,1000",
        "a,-1,2,1,1000",
        "a,1,,1,1000",
        "a,1,2,2,500",
        "a,1,2,1,1001",
        "a,1,2,1,0",
        "a,1e3,2,1,1",
        f"a,{1 << 70},2,1,1",
    ],
)
def test_pods_that_cannot_be_are_refused(row: str) -> None:
    with pytest.raises(Invalid):
        read_pods(io.StringIO(f"name,cpu_milli,memory_mib,num_gpu,gpu_milli\n{row}\n"), openb_fleet())


@pytest.mark.parametrize(
    "text", ["", "x,y\n1,2\n", NODES + "n1,1,1,1,T4\n", NODES + "n3,-1,1,1,T4\n", "sn,cpu_milli,memory_mib,gpu,model\n"]
)
def test_node_lists_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        read_fleet(io.StringIO(text))


def test_a_share_of_several_gpus_is_refused() -> None:
    with pytest.raises(Invalid):
        pod_row(1, 1, 2, 500, ANY_MODEL)
