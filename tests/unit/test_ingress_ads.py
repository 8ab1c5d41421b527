"""The ADS server towards a client that asks all the time whether it lives, as Envoy does."""

from __future__ import annotations

import asyncio
from pathlib import Path

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest

from atoll.ingress.ads import OPTIONS, AdsServer
from atoll.ingress.bootstrap import PLACE_BYTES_MAX
from atoll.ingress.hostnames import ASKED_MAX
from atoll.ingress.resources import ROUTE_CONFIG, Kind
from atoll.model.ports.clock import SystemClock

# RFC 9113: the client's preface and an empty SETTINGS frame, then a PING frame; frame types.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
PING = bytes.fromhex("000008060000000000") + b"is it up"
PING_TYPE, GOAWAY_TYPE = 6, 7
PINGS = 6
"""gRPC would give up on such a client at the third."""


async def test_a_client_that_pings_is_answered_each_time_and_not_sent_away(tmp_path: Path) -> None:
    server = AdsServer({}, SystemClock(), refused=lambda resource, why: None)
    await server.start(tmp_path / "ads")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "ads")
    writer.write(PREFACE)
    kinds: list[int] = []
    for number in range(1, PINGS + 1):
        writer.write(PING)
        while kinds.count(PING_TYPE) < number and GOAWAY_TYPE not in kinds:
            header = await asyncio.wait_for(reader.readexactly(9), 10)
            await reader.readexactly(int.from_bytes(header[:3], "big"))
            kinds.append(header[3])
    assert GOAWAY_TYPE not in kinds
    writer.close()
    await server.stop()


def test_an_envoy_that_was_asked_for_the_longest_names_there_are_can_tell_all_of_them_at_once() -> None:
    name = f"{ROUTE_CONFIG}/{'x' * PLACE_BYTES_MAX}"
    request = DeltaDiscoveryRequest(type_url=Kind.HOST, resource_names_subscribe=[name] * ASKED_MAX)
    # Twice over: some are asked for before it is told all hostnames.
    assert 2 * request.ByteSize() < dict(OPTIONS)["grpc.max_receive_message_length"]
