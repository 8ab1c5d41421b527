"""People and tools at the API while a cell is full: reads, lists, watches, plans and deploys, timed from outside by call."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from atoll.model.errors import AtollError
from atoll.sdk.http import HttpTransport

LIST = 100
PAUSE_S = 0.05
"""Between two calls of one person; three work at a time."""
PEOPLE = 3


def app_body(name: str, replicas: int) -> bytes:
    """Return a spec as people write them: a port with a check, a few variables, a route of its own."""
    spec = {
        "name": name,
        "image": "registry.example/team/service@sha256:" + "0" * 64,
        "env": {f"SETTING_{number}": "some value or other" for number in range(6)},
        "resources": {"cpu": 0.5, "memory": "256MiB"},
        "ports": [{"name": "http", "port": 8080}],
        "scale": {"replicas": replicas},
    }
    return json.dumps(spec).encode()


class Api:
    """Calls the API and remembers how long each kind of call took. `failed`, where given, is counted on."""

    def __init__(self, address: str, token: str, failed: Counter[str] | None = None) -> None:
        self.transport = HttpTransport(address, token)
        self.took: dict[str, list[float]] = defaultdict(list)
        self.failed: Counter[str] = Counter() if failed is None else failed

    async def call(self, what: str, method: str, path: str, body: bytes = b"", *, fine: Sequence[int] = ()) -> Any:
        """Return the answer's JSON; None where it failed, which is counted."""
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"} if body else None
        try:
            answer = await self.transport.request(method, path, headers=headers, body=body, timeout_s=60.0)
        except AtollError as error:
            self.failed[f"{what}: {error.code}"] += 1
            return None
        self.took[what].append(time.perf_counter() - began)
        if answer.status >= 400 and answer.status not in fine:
            self.failed[f"{what}: {answer.status} {answer.body[:200].decode(errors='replace')}"] += 1
            return None
        return json.loads(answer.body) if answer.body[:1] in (b"{", b"[") else answer.body

    async def watch_snapshot(self, what: str, query: str) -> int:
        """Return how many records a watch shows until it is current."""
        began = time.perf_counter()
        count = 0
        async with self.transport.lines(f"/v1/watch?{query}") as lines:
            async for line in lines:
                if b'"kind"' not in line:
                    break
                count += 1
        self.took[what].append(time.perf_counter() - began)
        return count

    async def close(self) -> None:
        await self.transport.close()


class People:
    """Use the API until cancelled. `apps` are `(project, app)`."""

    def __init__(self, api: Api, apps: Sequence[tuple[str, str]], nodes: int, seed: int = 1) -> None:
        self._api = api
        self._apps = apps
        self._nodes = nodes
        self._chance = random.Random(seed)
        self._deployed = 0
        self.deploys: list[float] = []
        """From the request to an instance that is ready, as a watch shows it."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(PEOPLE):
                tasks.create_task(self._look())
            tasks.create_task(self._deploy())

    async def _look(self) -> None:
        call = self._api.call
        while True:
            project, app = self._chance.choice(self._apps)
            at = f"/v1/projects/{project}"
            node = f"n{self._chance.randrange(self._nodes):05d}"
            await call("read an app", "GET", f"{at}/apps/{app}")
            found = await call("list an app's instances", "GET", f"{at}/instances?app={app}&limit={LIST}")
            if found and found["items"]:
                id = found["items"][0]["instance"]["id"]
                await call("read an instance", "GET", f"{at}/instances/{id}")
                await call("explain an instance", "GET", f"{at}/instances/{id}/explain")
            await call("list instances, a page of a project", "GET", f"{at}/instances?limit={LIST}")
            await call("list apps, a page", "GET", f"{at}/apps?limit={LIST}")
            await call("read a node", "GET", f"/v1/nodes/{node}")
            await call("list nodes, a page", "GET", f"/v1/nodes?limit={LIST}")
            await call("list events", "GET", f"{at}/events?limit={LIST}")
            await call("plan", "POST", "/v1/plan", app_body("what-if", 10))
            await call("put a secret", "PUT", f"{at}/secrets/s{self._chance.randrange(50)}", b'{"value": "x"}')
            if self._chance.random() < 0.1:
                await call("usage of a project", "GET", f"/v1/usage?project={project}")
                await call("metrics of a project", "GET", f"/metrics?project={project}")
                await self._api.watch_snapshot(
                    "watch a project's apps and instances, until current", f"kinds=apps,instances,statuses&project={project}"
                )
            if self._chance.random() < 0.02:
                await self._api.watch_snapshot("watch all nodes, until current", "kinds=nodes,node-liveness")
            await asyncio.sleep(PAUSE_S)

    async def _deploy(self) -> None:
        """Deploy a small app, wait until it serves, scale it, delete it: again and again."""
        while True:
            project, _ = self._chance.choice(self._apps)
            self._deployed += 1
            name = f"new{self._deployed}"
            at = f"/v1/projects/{project}/apps/{name}"
            began = time.perf_counter()
            if await self._api.call("deploy an app", "PUT", at, app_body(name, 3)) is not None:
                await self._until_ready(project, name, 3, began)
                await self._api.call("scale an app", "POST", f"{at}/scale", b'{"replicas": 5}')
                await asyncio.sleep(1.0)
                await self._api.call("delete an app", "DELETE", at)
            await asyncio.sleep(1.0)

    async def _until_ready(self, project: str, name: str, wanted: int, began: float) -> None:
        async with asyncio.timeout(120.0):
            while True:
                view = await self._api.call("read an app", "GET", f"/v1/projects/{project}/apps/{name}")
                if view is not None and (view.get("status") or {}).get("ready", 0) >= wanted:
                    self.deploys.append(time.perf_counter() - began)
                    return
                await asyncio.sleep(0.1)
