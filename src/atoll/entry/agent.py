"""`atoll agent`: the node's agent, over HTTP to the server, with this machine's real runtimes, images and network."""

from __future__ import annotations

import signal

from atoll.entry.beats import beating, beating_of
from atoll.entry.config import Config
from atoll.entry.fabric import enter
from atoll.entry.gpus import foreign_devices, node_devices
from atoll.entry.joining import kept, reach
from atoll.entry.process import Stop, run, run_until
from atoll.images.disk import spread_below
from atoll.images.lazy.shown import LazyImages
from atoll.images.reference import CELL_HOST
from atoll.images.registry import Registries
from atoll.images.registry_auth import RegistryAuth
from atoll.images.store import ImageStore
from atoll.model.fabric import network_of
from atoll.model.membership import MemberKind
from atoll.model.ports.clock import SystemClock, system_random
from atoll.model.ports.runtime import Runtime
from atoll.model.worker import SERVICES
from atoll.node.agent import Agent
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.oci_box import RUNTIME_DIRECTORY
from atoll.runtimes.offer import RUNTIMES, AnyRuntime
from atoll.runtimes.workerd import WorkerdRuntime
from atoll.sdk.private_file import make_private


async def main(config: Config, stop: Stop) -> None:
    """Run the agent until `stop`; then let go of what runs; on SIGINT stop it first."""
    data = config.agent_data
    labels, taints = config.node_labels, config.node_taints
    if config.subnet:
        network_of(config.subnet, "subnet")  # before it joins, and uses its token up
    auth = RegistryAuth(config.registry_auth) if config.registry_auth is not None else None
    found = await reach(config, MemberKind.NODE, data, stop)
    if found is None:
        return
    access = {CELL_HOST: found.registry()}
    registries = Registries(access, default=config.default_registry or None, find=auth)
    lazy = LazyImages(data / "images" / "lazy", {**(auth.known if auth is not None else {}), **access})
    images = ImageStore(data / "images", registries, lazy=lazy)
    for busy in (data / "instances", data / "volumes", data / "logs", data / "runtimes", data / "network", RUNTIME_DIRECTORY):
        make_private(busy, 0o711 if busy == RUNTIME_DIRECTORY else 0o700)
        spread_below(busy)  # a start makes a dozen files, and is not to wait for the disk's search for free ones
    clock = SystemClock()
    control = found.control_plane(node=found.name)
    pulse = beating_of(found, control, clock, data)
    entered = await enter(config, control, found.servers, found.name, data / "network", clock, stop)
    if entered is None:
        return
    network, fabric = entered
    # Beats come first: looking at devices and runtimes may take longer than a node may be silent.
    async with kept(found, MemberKind.NODE, control), beating(pulse), fabric:
        agent = Agent(
            node=found.name,
            control=control,
            runtimes=tuple(_runtime(kind, config) for kind in RUNTIMES),
            images=images,
            network=network,
            clock=clock,
            random=system_random(),
            data=data,
            site=config.site,
            region=config.region,
            labels=labels,
            taints=taints,
            devices=await node_devices(data, clock, nvproxy_driver=config.nvproxy_driver),
            foreign=foreign_devices(config.cdi_devices),
            beating=pulse,
        )

        async def last() -> None:
            if stop.signal == signal.SIGINT:
                await agent.stop_instances()

        await run_until(stop, agent.run(), last)
        fabric.remove = stop.signal == signal.SIGINT
    await images.close()
    if stop.signal == signal.SIGINT:
        lazy.end()
    await registries.aclose()


def _runtime(kind: AnyRuntime, config: Config) -> Runtime:
    directory = config.agent_data / "runtimes" / kind.name
    if issubclass(kind, WorkerdRuntime):
        return kind(directory, services=config.ingress_data / SERVICES)
    if issubclass(kind, GvisorRuntime):
        return kind(directory, nvproxy_driver=config.nvproxy_driver)
    return kind(directory)


if __name__ == "__main__":
    run("agent", main)
