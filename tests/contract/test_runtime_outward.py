"""The world outside by IPv6, from inside of what each kind of runtime makes: gVisor's own stack leads there, and a guest's."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from runtime_world import make_layer, real_world

from atoll.model.fabric import new_ula
from atoll.network import namespaces
from atoll.network.links import LinkNetwork
from atoll.network.outward import Outward
from atoll.network.sysctls import no_ipv6

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root"),
    pytest.mark.skipif(bool(no_ipv6()), reason=f"no IPv6 here: {no_ipv6()}"),
]


@pytest.fixture
def wire() -> Iterator[tuple[str, str, str]]:
    """The name of a namespace beyond the node, the node's address on the wire to it, and its own."""
    third = random.randrange(1, 0xFFFF)
    name = f"beyond{third:x}"  # never the last one's: a wire goes some time after the namespace at its other end
    node, address = f"2001:db8:{third:x}::1", f"2001:db8:{third:x}::2"
    try:
        for command in (
            f"netns add {name}",
            f"link add {name} type veth peer name eth0 netns {name}",
            f"-6 addr add {node}/64 dev {name} nodad",
            f"link set {name} up",
            f"-n {name} -6 addr add {address}/64 dev eth0 nodad",
            f"-n {name} link set eth0 up",
        ):
            subprocess.run(["ip", *command.split()], check=True, timeout=20)
        yield name, node, address
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)


@pytest.mark.timeout(400)  # of a machine that is emulated
@pytest.mark.parametrize("kind", ["runc", "gvisor", pytest.param("qemu", marks=pytest.mark.soak)])
async def test_it_reaches_the_world_by_ipv6_where_the_node_does(kind: str, tmp_path: Path, wire: tuple[str, str, str]) -> None:
    name, node, address = wire
    world = real_world(kind, tmp_path, make_layer(tmp_path))
    network = LinkNetwork(
        f"10.92.{os.getpid() % 256}.0/24", tmp_path / "network", prepared=1, resolver_sources=(), rules_check_s=0.1,
        ula=new_ula(os.urandom(5)), outward=Outward(node, world=address),
    )  # fmt: skip
    path = namespaces.DIRECTORY / name
    try:
        link = await network.attach("out", project="p", ports=())
        await world.launch("out", "run", netns=link.netns)
        with closing(namespaces.run_inside(path, lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))) as server:
            server.settimeout(20)
            server.bind(("::", 8000))
            server.listen()

            def take() -> tuple[bytes, str]:
                connection, peer = server.accept()
                with closing(connection):
                    connection.settimeout(20)
                    return connection.recv(16), str(peer[0])

            taken = asyncio.create_task(asyncio.to_thread(take))
            status, said = await world.shell("out", f"echo hello | nc -w 5 {address} 8000")
            assert await taken == (b"hello\n", node), said
            # When the node's address is gone, nobody waits: it is refused, or has no way at all.
            subprocess.run(["ip", "-6", "addr", "del", f"{node}/64", "dev", name], check=True, timeout=20)  # noqa: ASYNC221
            for _ in range(200):
                if not network.outward:
                    break
                await asyncio.sleep(0.05)
            status, said = await world.shell("out", f"nc -w 20 {address} 8000 < /dev/null")
            assert status != 0
            assert "refused" in said or "nreachable" in said
    finally:
        await world.close()
        await network.recover(())
        await network.close()
