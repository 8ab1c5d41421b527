"""One question to an agent over a stream of its own, and the answer or the error that comes back."""

from __future__ import annotations

import asyncio

from atoll.model import codec
from atoll.model.errors import BY_CODE, AtollError, NotFound, OutcomeUnknown, Unsupported
from atoll.model.ports.control_plane import Channel
from atoll.model.streams import ErrorBody, Kind, unpack


async def answer_of(pipe: Channel, node: str, deadline_s: float, *, of_node: bool = False) -> bytes:
    """Return what the agent of `node` answers on a stream that was opened to it, and close that. `of_node`: no instance was named.

    Raises what the agent answers; Unsupported (of the node: an agent of before this question), OutcomeUnknown (it did not say).
    """
    try:
        async with asyncio.timeout(deadline_s):
            message = await pipe.receive()
    except TimeoutError:
        message = None
    finally:
        await pipe.close()
    if message is None:
        raise OutcomeUnknown(f"node '{node}' did not say what came of it", mend=f"see how it stands: atoll nodes show {node}")
    kind, payload = unpack(message)
    if kind is Kind.ERROR:
        body = codec.decode(payload, ErrorBody)
        if of_node and body.code == NotFound.code and body.field is None:  # an agent of before looks for an instance
            raise Unsupported(f"the agent of node '{node}' is too old for this", mend="update it, or restart the node")
        raise BY_CODE.get(body.code, AtollError)(body.message, mend=body.mend, field=body.field)
    return payload
