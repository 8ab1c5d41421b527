"""Which images nodes have, from their heartbeats to where an instance goes."""

from __future__ import annotations

import asyncio

from control_cell import Cell, run_virtual

from atoll.model.records import Heartbeat
from atoll.model.spec import AppSpec

DIGEST = "sha256:" + "a" * 64


def test_an_instance_goes_where_a_heartbeat_says_its_image_is_and_no_more_when_the_node_is_forgotten() -> None:
    async def main() -> None:
        async with Cell() as cell:
            for name in ("n1", "n2", "n3"):
                await cell.add_node(name)
            cell.heartbeats["n3"] = Heartbeat(node="n3", at=1.0, images=(DIGEST,))
            cell.lead()
            await asyncio.sleep(2)
            await cell.deploy(AppSpec(name="web", image=f"host/web:1@{DIGEST}"))
            await cell.until(lambda: [i.node for i in cell.instances()] == ["n3"])
            del cell.heartbeats["n3"]
            cell.heartbeats["n2"] = Heartbeat(node="n2", at=2.0, images=(DIGEST,))
            await asyncio.sleep(2)
            await cell.deploy(AppSpec(name="other", image=f"host/web:1@{DIGEST}"))
            # Fuller nodes come first otherwise, and that is n3.
            await cell.until(lambda: [i.node for i in cell.instances() if i.owner == "other"] == ["n2"])

    run_virtual(main())
