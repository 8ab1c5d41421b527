"""Global placement: the model of round trips, and where replicas go in cases that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.model.errors import Invalid
from atoll.scheduling.world import Place, Problem, choose, demo_places, distances_km, preferred, round_trips_ms

pytestmark = pytest.mark.timeout(400)  # kernels compile at their first use, which takes a busy machine minutes

PARIS = Place(name="paris", latitude=48.86, longitude=2.35)
LONDON = Place(name="london", latitude=51.51, longitude=-0.13)
SYDNEY = Place(name="sydney", latitude=-33.87, longitude=151.21)
LIMA = Place(name="lima", latitude=-12.05, longitude=-77.04)


def line(count: int) -> np.ndarray:
    """Places on a line, 10 ms apart; each is a site too."""
    at = np.arange(count) * 10.0
    return np.abs(at[:, None] - at[None, :])


def problem(**more: object) -> Problem:
    base = {
        "latency_ms": line(5),
        "demand": np.array([10.0, 1.0, 1.0, 1.0, 10.0]),
        "room": np.full(5, 2),
        "count": 2,
        "replica_capacity": 20.0,
    }
    return Problem(**(base | more))  # type: ignore[arg-type]


def test_distances_are_great_circles() -> None:
    assert distances_km((PARIS,), (LONDON,))[0, 0] == pytest.approx(344, abs=2)
    assert distances_km((PARIS,), (PARIS,))[0, 0] == 0
    south = Place(name="s", latitude=-48.86, longitude=2.35 - 180)
    assert distances_km((PARIS,), (south,))[0, 0] == pytest.approx(20015, abs=1)


def test_a_measured_pair_takes_its_measurement_and_another_the_formula() -> None:
    measured = round_trips_ms((LONDON,), (SYDNEY,))[0, 0]
    formula = round_trips_ms((LONDON,), (SYDNEY,), measured=False)[0, 0]
    assert measured == pytest.approx(276, abs=15)
    assert measured != formula
    assert round_trips_ms((LIMA,), (SYDNEY,))[0, 0] == round_trips_ms((LIMA,), (SYDNEY,), measured=False)[0, 0]


def test_demo_places_are_on_earth_and_have_names_of_their_own() -> None:
    places = demo_places()
    assert len({place.name for place in places}) == len(places) == 351
    assert all(abs(place.latitude) <= 90 and abs(place.longitude) <= 180 for place in places)


def test_replicas_go_where_demand_comes_from() -> None:
    choice = choose(problem())
    assert choice.replicas.tolist() == [1, 0, 0, 0, 1]
    assert choice.unserved == 0
    assert choice.latency_ms == pytest.approx((10 + 20 + 10) / 23)


def test_a_full_site_sends_demand_to_the_next() -> None:
    choice = choose(problem(count=3, replica_capacity=8.0, room=np.array([1, 1, 0, 0, 1])))
    assert choice.replicas.tolist() == [1, 1, 0, 0, 1]
    assert choice.flow.sum(axis=0).max() <= 8.0 + 1e-6
    assert choice.flow.sum() == pytest.approx(23.0)


def test_a_latency_bound_and_residency_are_never_broken() -> None:
    allowed = np.ones((5, 5), dtype=np.bool_)
    allowed[0] = [False, False, True, False, False]
    choice = choose(problem(latency_ms_max=15.0, allowed=allowed))
    assert choice.unserved >= 10.0
    assert choice.flow[0].sum() == 0
    assert choice.flow[line(5) > 15.0].sum() == 0


def test_demand_beyond_all_capacity_is_said_to_be_unserved() -> None:
    choice = choose(problem(count=1))
    assert choice.unserved == pytest.approx(3.0)


def test_regions_are_taken_in_order_with_fallback() -> None:
    given = problem(room=np.array([1, 1, 1, 1, 1]))
    cost = preferred(["a", "a", "b", "b", "b"], ["b", "any"], given.latency_ms, given.demand)
    assert choose(problem(room=np.array([1, 1, 1, 1, 1]), site_cost=cost)).replicas[:2].sum() == 0
    few = problem(room=np.array([1, 1, 1, 0, 0]), site_cost=cost)
    assert choose(few).replicas.tolist() in ([1, 0, 1, 0, 0], [0, 1, 1, 0, 0])


def test_nothing_moves_that_gains_less_than_it_costs() -> None:
    before = [0, 1, 0, 0, 1]
    gain = (10 * 10 - 2 * 10) * 1.0
    assert choose(problem(move_cost=gain + 60), before).replicas.tolist() == before
    moved = choose(problem(move_cost=1.0), before)
    assert moved.replicas.tolist() == [1, 0, 0, 0, 1]
    assert moved.moved == 1


def test_a_replica_without_room_or_without_permission_leaves() -> None:
    choice = choose(problem(room=np.array([0, 2, 2, 2, 2]), move_cost=1e6), [1, 0, 0, 0, 1])
    assert choice.replicas[0] == 0
    assert choice.replicas.sum() == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"demand": np.array([1.0, np.nan, 0, 0, 0])},
        {"demand": np.array([-1.0, 0, 0, 0, 0])},
        {"demand": np.ones(4)},
        {"room": np.array([1, 1, 1, 1, -1])},
        {"latency_ms": np.full((5, 5), np.inf)},
        {"replica_capacity": 0.0},
        {"replica_capacity": float("nan")},
        {"count": -1},
        {"move_cost": -1.0},
        {"latency_ms_max": float("nan")},
    ],
)
def test_numbers_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        choose(problem(**wrong))


def test_nothing_wanted_or_nothing_there_is_no_error() -> None:
    assert choose(problem(count=0)).unserved == pytest.approx(23.0)
    assert choose(problem(room=np.zeros(5, dtype=np.int64))).replicas.sum() == 0
    assert choose(problem(demand=np.zeros(5))).latency_ms == 0.0
