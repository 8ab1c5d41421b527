"""The ingress's port for TLS is somebody else's: it serves without, and says so where people look."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rollouts_service import Cell, cell

from atoll.entry.config import TLS_PORT_APART, Config
from atoll.entry.up import without_tls
from atoll.ingress.envoy import EnvoyProcess, free_port
from atoll.model.errors import Unavailable
from atoll.model.ports.clock import SystemClock
from atoll.model.records import INGRESS_PROBLEM, Ingress, IngressHeartbeat

__all__ = ["cell"]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        yield int(other.getsockname()[1])


def test_up_says_that_the_port_for_tls_is_taken_and_how_to_name_another(taken: int) -> None:
    said = without_tls(Config(ingress=f"127.0.0.1:{taken - TLS_PORT_APART}"))
    assert f"127.0.0.1:{taken}" in said
    assert "--ingress-tls-port" in said


def test_up_says_nothing_of_tls_where_it_is_served_or_turned_off(taken: int) -> None:
    assert without_tls(Config(ingress=f"127.0.0.1:{taken - TLS_PORT_APART}", ingress_tls_port="off")) == ""
    free = free_port("127.0.0.1")
    assert without_tls(Config(ingress=f"127.0.0.1:{free - TLS_PORT_APART}")) == ""


async def test_envoy_does_without_a_taken_port_for_tls_and_says_why(tmp_path: Path, taken: int) -> None:
    port = free_port("127.0.0.1")
    never = Path("/bin/false")  # what is looked at is settled before Envoy starts
    envoy = EnvoyProcess(
        tmp_path, name="x", address="127.0.0.1", port=port, clock=SystemClock(), binary=never, tls_port=taken, tls_needed=False
    )
    assert envoy.without_tls == ""
    with pytest.raises(Unavailable):
        await envoy.start()
    assert envoy.tls_port == 0
    assert f":{taken}" in envoy.without_tls
    assert "--ingress-tls-port" in envoy.without_tls


async def test_what_is_wrong_with_an_ingress_itself_is_a_problem_that_is_told_in_words(cell: Cell) -> None:
    await cell.service.control_plane.register_ingress(Ingress(name="edge", site="here", http_port=80))
    problems = {INGRESS_PROBLEM: "no TLS: taken"}
    await cell.service.control_plane.ingress_heartbeat(IngressHeartbeat(ingress="edge", site="here", at=0.0, problems=problems))
    (view,) = cell.service.ingress_records.all()
    assert (view.problems, view.problem) == (1, "no TLS: taken")
