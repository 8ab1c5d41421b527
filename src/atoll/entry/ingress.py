"""`atoll ingress`: Envoy, kept configured from the server's routes."""

from __future__ import annotations

from atoll.entry.config import Config, split_address
from atoll.entry.joining import kept, reach
from atoll.entry.process import Stop, run, run_until
from atoll.ingress.service import Ingress
from atoll.ingress.tracing import tracing_of
from atoll.model.membership import MemberKind


async def main(config: Config, stop: Stop) -> None:
    """Run the ingress until `stop`, and Envoy with it."""
    found = await reach(config, MemberKind.INGRESS, config.ingress_data, stop)
    if found is None:
        return
    address, port = split_address(config.ingress, field="--ingress")
    control = found.control_plane()
    ingress = Ingress(
        control,
        config.ingress_data,
        name=found.name,
        site=config.site,
        address=address,
        port=port,
        domain=config.domain,
        certificates=control,
        callers=control,
        tls_port=config.tls_port,
        tls_needed=bool(config.ingress_tls_port),
        tracing=tracing_of(config.otlp, config.trace_percent),
        one_family=config.no_ipv6,
    )
    async with kept(found, MemberKind.INGRESS, control):
        await run_until(stop, ingress.run())


if __name__ == "__main__":
    run("ingress", main)
