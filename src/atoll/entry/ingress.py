"""`atoll ingress`: Envoy, kept configured from the server's routes."""

from __future__ import annotations

from atoll.entry.config import Config, split_address
from atoll.entry.process import Stop, read_token, run, run_until
from atoll.ingress.service import Ingress
from atoll.sdk.control_plane import HttpControlPlane


async def main(config: Config, stop: Stop) -> None:
    """Run the ingress until `stop`, and Envoy with it."""
    token = await read_token(config.ingress_data / "token", stop)
    if token is None:
        return
    address, port = split_address(config.ingress, field="--ingress")
    ingress = Ingress(
        HttpControlPlane(f"http://{config.api}", token),
        config.ingress_data,
        name=config.node_name,
        site=config.site,
        address=address,
        port=port,
        domain=config.domain,
    )
    await run_until(stop, ingress.run())


if __name__ == "__main__":
    run("ingress", main)
