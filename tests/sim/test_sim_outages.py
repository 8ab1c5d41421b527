"""A site that is cut off, and a cell without its control plane: what serves goes on, and all is well soon after."""

from __future__ import annotations

import asyncio

import pytest

from atoll.model.errors import AtollError
from atoll.sim.ingress import RETRY_S, SimIngress
from atoll.sim.mutants import WithIngress
from atoll.sim.outages import ControlDown, SiteCut, quiet
from atoll.sim.run import run_seed
from atoll.sim.world import World


@pytest.mark.parametrize("seed", range(4))
def test_a_site_cut_off_for_ten_minutes_serves_and_heals_and_is_at_rest_within_30_s_of_its_return(seed: int) -> None:
    outcome = run_seed(seed, shape=quiet, world=SiteCut)
    assert outcome.broken == ()
    assert outcome.marks["requests answered meanwhile"] > 1_000
    assert outcome.marks["a crashed process was started again at its site"] > 5
    assert outcome.marks["a process and its agent crashed during an outage"] > 0


def test_an_hour_without_the_control_plane_costs_no_request_and_no_instance() -> None:
    outcome = run_seed(0, shape=quiet, world=ControlDown)
    assert outcome.broken == ()
    assert outcome.virtual_s > 3_600
    assert outcome.marks["requests answered meanwhile"] > 5_000
    assert outcome.marks["a crashed process was started again at its site"] > 5
    assert outcome.marks["a process and its agent crashed during an outage"] > 0


class Amnesiac(SimIngress):
    """Forgets where its apps are when it loses the control plane."""

    async def _follow(self) -> None:
        while True:
            batches = self.line.routing(self.name)
            try:
                while True:
                    async with asyncio.timeout(15.0):
                        self._apply(await anext(batches))
            except (AtollError, TimeoutError):
                self.routings.clear()
                await asyncio.sleep(RETRY_S)


@pytest.mark.parametrize("world", [SiteCut, ControlDown])
def test_an_ingress_that_needs_the_control_plane_to_serve_is_found_out(world: type[World]) -> None:
    broken = run_seed(0, WithIngress(Amnesiac), quiet, world).broken
    assert any("failed: nobody there" in promise for promise in broken)
