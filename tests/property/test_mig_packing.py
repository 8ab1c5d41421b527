"""MIG placement: never a needless refusal, always what hardware takes, and near the optimum."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.devices.fake_mig import MigBoard, mig_models, obstacle
from atoll.devices.fake_mig import profiles_of as fake_profiles_of
from atoll.model.devices import COMPUTE_SLICES, GpuDevice, GpuGrant, GpuPartition
from atoll.model.spec import Gpu
from atoll.scheduling.gpu.grants import fits, grant
from atoll.scheduling.gpu.mig import Layout, table_of, with_part
from atoll.scheduling.gpu.mig_measure import MODELS, compare, profiles_of

steps = st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(0, 6)), max_size=60)


@given(st.sampled_from(mig_models()), st.integers(1, 3), steps)
@settings(max_examples=300, deadline=None)
def test_every_choice_is_taken_by_the_hardware_and_a_refusal_means_that_no_start_is_free(
    model: str, count: int, todo: list[tuple[bool, int, int]]
) -> None:
    profiles = fake_profiles_of(model, 80 << 30)
    boards = {f"d{n}": MigBoard(f"d{n}", profiles) for n in range(count)}
    devices = [GpuDevice(id=id, model=model, memory_bytes=80 << 30, mig=True, profiles=profiles) for id in boards]
    held: list[GpuGrant] = []
    for comes, which, kind in todo:
        if not comes:
            if held:
                gone = held.pop(which % len(held))
                boards[gone.device].remove(gone.start)
            continue
        profile = profiles[kind]
        chosen = grant(devices, held, Gpu(profile=profile.name))
        if chosen is None:
            free = [
                start
                for board, start in product(boards.values(), profile.starts)
                if not obstacle(profiles, board.partitions(), profile, start)
            ]
            assert free == []
            continue
        (part,) = chosen
        made = boards[part.device].make(part.profile, part.start)
        assert (made.start, made.size, part.memory_bytes) == (part.start, part.size, profile.memory_bytes)
        held.append(part)
    for board in boards.values():
        parts = board.partitions()
        assert sum(next(p.compute_slices for p in profiles if p.name == part.profile) for part in parts) <= COMPUTE_SLICES


def by_trying(profiles: tuple[object, ...], layout: Layout, name: str) -> int:
    table = table_of(profiles)  # type: ignore[arg-type]  # as it came
    tries = (with_part(layout, table.part(name, start)) for start in table.starts(layout, name))
    return max((1 + by_trying(profiles, more, name) for more in tries), default=0)


@given(st.sampled_from(MODELS), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6), st.integers(0, 6))
@settings(max_examples=200, deadline=None)
def test_room_is_what_trying_every_start_finds_and_fits_never_says_more(
    model: str, wanted: list[tuple[int, int]], kind: int
) -> None:
    profiles = profiles_of(model)
    table = table_of(profiles)
    layout: Layout = ()
    for which, place in wanted:
        starts = table.starts(layout, profiles[which].name)
        if starts:
            layout = with_part(layout, table.part(profiles[which].name, starts[place % len(starts)]))
    name = profiles[kind].name
    assert table.room(layout, name) == by_trying(profiles, layout, name)
    assert 0.0 <= table.worth(layout) <= 1.0
    foreign = tuple(GpuPartition(id="x", profile=part.profile, start=part.start, size=part.size) for part in layout)
    device = GpuDevice(id="d", model=model, memory_bytes=0, mig=True, profiles=profiles, foreign=foreign)
    assert fits([device], (), Gpu(profile=name)) == table.room(layout, name), "the policy does not stand in its own way"


@given(st.sampled_from(MODELS), st.lists(st.integers(0, 6), max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_start_is_chosen_that_keeps_as_many_of_the_largest_as_any_other(model: str, wanted: list[int]) -> None:
    profiles = profiles_of(model)
    table = table_of(profiles)
    layout: Layout = ()

    def kept(after: Layout) -> list[int]:
        largest_first = sorted(profiles, key=lambda one: -one.memory_slices)
        return [table.room(after, one.name) for one in largest_first if one.memory_slices >= 4]

    for which in wanted:
        name = profiles[which].name
        start = table.best_start(layout, name)
        if start is None:
            continue
        options = [with_part(layout, table.part(name, other)) for other in table.starts(layout, name)]
        layout = with_part(layout, table.part(name, start))
        assert sum(kept(layout)) == max(sum(kept(option)) for option in options)


@pytest.mark.parametrize("model", MODELS)
def test_placement_accepts_at_least_98_per_cent_of_what_the_best_policy_does_and_never_refuses_needlessly(model: str) -> None:
    measured = compare(range(10), model, requests=100)
    assert measured.needless == 0
    assert measured.long_run >= 0.995
    assert measured.ratio >= 0.98


def test_what_knows_the_future_is_beaten_by_none_that_does_not() -> None:
    measured = compare(range(6), "H100-80GB", requests=60, load=1.0)
    assert measured.clairvoyant_bytes is not None
    assert max(measured.ours_bytes, measured.optimum_bytes) <= measured.clairvoyant_bytes <= measured.offered_bytes
    assert compare(range(6), "H100-80GB", requests=60, load=1.0) == measured
