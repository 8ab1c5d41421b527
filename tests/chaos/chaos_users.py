"""Who uses the cell while it suffers: requests to the apps, and clients of the API whose history must be linearizable."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from atoll.model.errors import AtollError, NotFound, StaleRevision
from atoll.model.spec import AppSpec, Scale
from atoll.sdk.client import Client
from atoll.sim.linear import NEVER, Operation, Record, check

REQUEST_S = 5.0
REQUEST_EVERY_S = 0.05
OPERATION_S = 15.0
PAUSE_S = 0.25
OPERATIONS_PER_RECORD_MAX = 1_000


class Requests:
    """Asks one app at one ingress, again and again."""

    def __init__(self, address: str, port: int, app: str) -> None:
        self._address = address
        self._port = port
        self._host = f"{app}.localhost"
        self._wanted = f"{app}\n".encode()
        self.good = 0
        self.bad: list[tuple[float, str]] = []
        """When, and what came instead."""
        self.slowest_s = 0.0

    async def run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(REQUEST_S):
                    answer = await self._ask()
                if answer.startswith(b"HTTP/1.1 200") and answer.endswith(self._wanted):
                    self.good += 1
                else:
                    self.bad.append((began, answer[:200].decode(errors="replace")))
            except (OSError, TimeoutError) as error:
                self.bad.append((began, repr(error)))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            await asyncio.sleep(REQUEST_EVERY_S)

    async def _ask(self) -> bytes:
        reader, writer = await asyncio.open_connection(self._address, self._port)
        try:
            writer.write(f"GET / HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n\r\n".encode())
            return await reader.read()
        finally:
            writer.close()


class History:
    """Clients that write and read records, apps without instances, and what each of them was told.

    Writes are linearizable, at whichever server. Reads come from a server's cache, which may lag: each must be of some moment up to
    its answer, so they are entered as if they had begun before all else.
    """

    def __init__(self, clients: list[Client], image: str, records: int = 3, seed: int = 1) -> None:
        self._clients = clients
        self._image = image
        self._records = [f"record-{n}" for n in range(records)]
        self._choose = random.Random(seed)
        self.operations: list[Operation] = []
        self.errors: list[str] = []
        """Of calls that ended in neither an answer nor a refusal by their condition."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, client in enumerate(self._clients):
                group.create_task(self._work(f"client-{number}", client))

    async def _work(self, name: str, client: Client) -> None:
        known: dict[str, int] = {}
        for count in range(OPERATIONS_PER_RECORD_MAX * len(self._records) // len(self._clients)):
            await asyncio.sleep(self._choose.random() * PAUSE_S)
            record = self._choose.choice(self._records)
            if self._choose.random() < 0.4:
                await self._read(name, client, record, known)
            else:
                expected = known.get(record) if self._choose.random() < 0.5 else None
                await self._write(name, client, record, f"{name}-{count}", expected, known)

    async def _write(self, name: str, client: Client, record: str, value: str, expected: int | None, known: dict[str, int]) -> None:
        spec = AppSpec(name=record, image=self._image, env={"VALUE": value}, scale=Scale(replicas=0))
        call, argument = ("put", value) if expected is None else ("put-if", (value, expected))
        began, ended, result = time.monotonic(), NEVER, None
        try:
            async with asyncio.timeout(OPERATION_S):
                view = await client.put_app(spec, if_revision=expected)
            ended, result = time.monotonic(), view.revision
            known[record] = view.revision
        except StaleRevision:
            ended = time.monotonic()
            known.pop(record, None)
        except (AtollError, TimeoutError) as error:
            self.errors.append(f"{call} by {name}: {error!r}")
        finally:
            # Without an answer it may have happened, now or later: also where this client is ended.
            operation = Operation(client=name, key=record, call=call, argument=argument, result=result, began=began, ended=ended)
            self.operations.append(operation)

    async def _read(self, name: str, client: Client, record: str, known: dict[str, int]) -> None:
        try:
            async with asyncio.timeout(OPERATION_S):
                view = await client.app("default", record)
        except NotFound:
            return  # that server has not heard of it yet
        except (AtollError, TimeoutError) as error:
            self.errors.append(f"get by {name}: {error!r}")
            return
        known[record] = view.revision
        result = (view.app.spec.env["VALUE"], view.revision)
        self.operations.append(Operation(client=name, key=record, call="get", result=result, began=0.0, ended=time.monotonic()))

    def check(self) -> None:
        """Raises AssertionError with the story of what cannot have been."""
        verdict = check(self.operations, Record())
        assert verdict.holds, verdict.story()

    @property
    def answered(self) -> int:
        return sum(each.answered for each in self.operations)


@asynccontextmanager
async def beside(*work: Requests | History) -> AsyncIterator[None]:
    """Run all of `work` for as long as the context lasts."""
    tasks = [asyncio.ensure_future(each.run()) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
