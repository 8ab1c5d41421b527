"""What every network promises to the agent: one suite on the fake and on the kernel's."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from atoll.model.errors import Exhausted, Unavailable
from atoll.model.fabric import ipv6_of
from atoll.model.ports.network import Network
from atoll.model.spec import Port, PortProtocol
from atoll.network.fake import FakeNetwork, FakeNetworkState
from atoll.network.links import LinkNetwork
from atoll.network.sysctls import no_ipv6

WEB = (Port(port=8000),)
ULA = "fd00:a70:1::/48"
Open = Callable[[], Network]


@pytest.fixture(params=["fake", pytest.param("links", marks=pytest.mark.system)])
async def node(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Calling it gives the network of a new agent on the same node. The node has room for 29 instances."""
    subnet = f"10.{random.randrange(96, 112)}.{random.randrange(256)}.0/27"
    networks: list[Network] = []
    ula = "" if request.param == "links" and no_ipv6() else ULA
    state = FakeNetworkState(subnet, ula)

    def open_network() -> Network:
        network: Network = FakeNetwork(state) if request.param == "fake" else LinkNetwork(subnet, tmp_path, prepared=2, ula=ula)
        networks.append(network)
        return network

    if request.param == "links" and os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    yield open_network
    for network in networks:
        await network.close()
    last = open_network()
    await last.recover(())
    await last.close()


async def test_each_instance_gets_an_address_of_its_own(node: Open) -> None:
    network = node()
    links = [await network.attach(f"i-{n}", project="default", ports=WEB) for n in range(10)]
    assert len({link.address for link in links}) == 10
    assert len({link.netns for link in links}) == 10
    assert len({link.interface for link in links}) == 10
    assert [link.id for link in links] == [f"i-{n}" for n in range(10)]


async def test_an_ipv6_address_follows_from_the_ipv4_one_and_stays_with_it(node: Open) -> None:
    first = node()
    link = await first.attach("a", project="default", ports=WEB)
    if link.ipv6 is None:
        pytest.skip(f"no IPv6 here: {no_ipv6()}")
    assert link.ipv6 == ipv6_of(ULA, link.address)
    assert (await first.attach("b", project="default", ports=WEB)).ipv6 != link.ipv6
    await first.close()
    assert list(await node().recover(("a",))) == [link]


async def test_attach_is_safe_to_repeat(node: Open) -> None:
    network = node()
    first = await network.attach("i-1", project="default", ports=WEB)
    assert await network.attach("i-1", project="default", ports=WEB) == first
    assert await network.attach("i-1", project="default", ports=()) == first


async def test_a_port_of_the_node_is_one_instances_until_it_is_detached(node: Open) -> None:
    network = node()
    published = (Port(port=8000, host=8153),)
    await network.attach("a", project="default", ports=published)
    assert (await network.attach("a", project="default", ports=published)).id == "a"
    with pytest.raises(Unavailable, match="tcp/8153 of this node is taken: instance a has it"):
        await network.attach("b", project="default", ports=published)
    await network.attach("b", project="default", ports=(Port(port=8000, host=8153, protocol=PortProtocol.UDP),))
    await network.detach("a")
    await network.attach("c", project="default", ports=published)


async def test_detach_is_safe_to_repeat_and_knows_no_error_for_strangers(node: Open) -> None:
    network = node()
    await network.attach("i-1", project="default", ports=WEB)
    await network.detach("i-1")
    await network.detach("i-1")
    await network.detach("never-was")


async def test_recover_adopts_what_is_kept_and_removes_the_rest(node: Open) -> None:
    first = node()
    links = {id: await first.attach(id, project="default", ports=WEB) for id in ("a", "b", "c")}
    await first.close()
    second = node()
    assert list(await second.recover(("c", "a", "unknown"))) == [links["c"], links["a"]]
    assert await second.attach("a", project="default", ports=WEB) == links["a"]
    again = await second.attach("b", project="default", ports=WEB)
    assert again.address not in {links["a"].address, links["c"].address}


async def test_close_ends_no_link(node: Open) -> None:
    first = node()
    link = await first.attach("i-1", project="default", ports=WEB)
    await first.close()
    assert list(await node().recover(("i-1",))) == [link]


async def test_an_adopted_address_is_never_given_twice(node: Open) -> None:
    first = node()
    kept = {(await first.attach(f"i-{n}", project="default", ports=WEB)).address for n in range(12)}
    await first.close()
    second = node()
    await second.recover([f"i-{n}" for n in range(12)])
    fresh = {(await second.attach(f"j-{n}", project="default", ports=WEB)).address for n in range(12)}
    assert not kept & fresh


async def test_an_address_that_was_freed_does_not_come_back_at_once_after_a_restart(node: Open) -> None:
    first = node()
    freed = (await first.attach("a", project="one", ports=WEB)).address
    await first.detach("a")
    await first.close()
    second = node()
    await second.recover(())
    assert (await second.attach("b", project="two", ports=WEB)).address != freed


async def test_a_full_pool_says_so_and_leaves_nothing_behind(node: Open) -> None:
    network = node()
    for n in range(29):
        await network.attach(f"i-{n}", project="default", ports=WEB)
    for _ in range(2):
        with pytest.raises(Exhausted) as caught:
            await network.attach("one-too-many", project="default", ports=WEB)
        assert caught.value.mend
    await network.detach("i-3")
    await network.attach("one-more", project="default", ports=WEB)
    with pytest.raises(Exhausted):
        await network.attach("one-too-many", project="default", ports=WEB)


async def test_a_burst_of_starts_is_served_side_by_side(node: Open) -> None:
    network = node()
    links = await asyncio.gather(*(network.attach(f"i-{n}", project="default", ports=WEB) for n in range(29)))
    assert len({link.address for link in links}) == 29
    await asyncio.gather(*(network.detach(f"i-{n}") for n in range(29)))
    again = await asyncio.gather(*(network.attach(f"j-{n}", project="default", ports=WEB) for n in range(29)))
    assert len({link.address for link in again}) == 29
