"""Where workers run for tests: real workerd processes in their jails, asked over HTTP from within their own networks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import http.client
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime_world import World

from atoll.model.errors import Unsupported
from atoll.model.ports.runtime import Mount, WorkerCode
from atoll.model.worker import MODULES, STATE, DurableObject, KvNamespace, ServiceBinding, Worker
from atoll.network.namespaces import run_inside
from atoll.runtimes.workerd import WorkerdRuntime

PORT, ALIVE = 8080, 8081
DATE = "2026-11-01"
ANSWER_S_MAX = 10.0
CODE = """
import { DurableObject } from "cloudflare:workers";
import note from "./note.txt";
import numbers from "./data/numbers.json";
import { twice } from "./lib/twice.js";
export class Counter extends DurableObject {
  async add() {
    const count = ((await this.ctx.storage.get("count")) ?? 0) + 1;
    await this.ctx.storage.put("count", count);
    return count;
  }
}
export default { async fetch(request, env) {
  const { pathname } = new URL(request.url);
  try {
    switch (pathname) {
      case "/env": return Response.json(env);
      case "/modules": return Response.json([note, numbers, twice(21)]);
      case "/log": console.log("to the log"); console.error("to the errors"); return new Response("logged");
      case "/count": return new Response(String(await env.COUNTERS.get(env.COUNTERS.idFromName("one")).add()));
      case "/keep": await env.KV.put("key", "kept"); return new Response("put");
      case "/kept": return new Response(await env.KV.get("key"));
      case "/out": return await fetch("http://127.0.0.1:8081/");
      case "/other": return await env.OTHER.fetch("http://any.where/asked?a=1", { headers: { "x-atoll-service": "evil/app/1" } });
      case "/loop": for (;;);
      case "/heap": { const all = []; for (;;) all.push(new Array(1e5).fill(Math.random())); }
      case "/buffers": { const all = []; for (;;) all.push(new Uint8Array(1e6).fill(1)); }
    }
  } catch (error) {
    return new Response(error.message, { status: 500 });
  }
  return new Response("hello");
} };
"""
MODULES_OF_CODE = {
    "index.js": CODE,
    "note.txt": "a note",
    "data/numbers.json": "[1, 2]",
    "lib/twice.js": "export const twice = (n) => 2 * n;",
    "broken.mjs.off": "not a module",
}


def make_modules(directory: Path, modules: dict[str, str]) -> Path:
    """Return a layer with the modules of a worker, as an image has them."""
    for name, text in modules.items():
        path = directory / MODULES[1:] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


class WorkerWorld(World):
    """`start` makes and starts a worker; `ask` asks a running one."""

    def __init__(self, directory: Path, make: Callable[[], WorkerdRuntime], layer: Path, *, cgroup: str) -> None:
        super().__init__(directory, make, (layer,), cgroup=cgroup)
        self.state = directory / "state"
        self.state.mkdir()
        self.state.chmod(0o777)

    def worker_box(
        self, id: str, /, *, bindings: tuple[str, ...] = (), worker: dict[str, Any] | None = None, **changes: Any
    ) -> Any:
        code = Worker(**{"main": "index.js", "compatibility_date": DATE, **(worker or {})})
        mounts = (Mount(self.state, STATE),) if code.stateful else ()
        given = WorkerCode(worker=code, project="p", port=PORT, alive_port=ALIVE, bindings=bindings)
        return self.box(id, **{"worker": given, "mounts": mounts, **changes})

    async def begin(self, id: str, **options: Any) -> int:
        """Start a worker without waiting for it."""
        await self.runtime.create(self.worker_box(id, **options))
        return (await self.runtime.start(id)).pid

    async def serve(self, id: str, **options: Any) -> int:
        """Start a worker and return its pid once it answers that it is alive."""
        pid = await self.begin(id, **options)
        deadline = time.monotonic() + ANSWER_S_MAX
        while True:
            try:
                assert (await self.ask(pid, "/", port=ALIVE))[0] == 204
                return pid
            except OSError:
                assert time.monotonic() < deadline, f"no answer; it said {self.output(id, 'stderr')!r}"
                await asyncio.sleep(0.01)

    async def ask(self, pid: int, path: str, *, port: int = PORT, timeout_s: float = ANSWER_S_MAX) -> tuple[int, str]:
        """Return status and body. Raises OSError where nothing listens, or nothing answers."""
        return await asyncio.to_thread(run_inside, Path(f"/proc/{pid}/ns/net"), lambda: ask_here(path, port, timeout_s))


def ask_here(path: str, port: int, timeout_s: float) -> tuple[int, str]:
    """Ask from the network that this thread is in."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except http.client.HTTPException as error:
        raise ConnectionResetError(str(error)) from None
    finally:
        connection.close()


STATEFUL = {
    "durable_objects": (DurableObject(binding="COUNTERS", class_name="Counter"),),
    "kv": (KvNamespace(binding="KV"),),
}
BOUND = {"services": (ServiceBinding(binding="OTHER", app="other", port=8000),)}


@functools.cache
def why_not() -> str:
    """Return why this machine runs no workers, or nothing."""
    with tempfile.TemporaryDirectory() as directory:
        runtime = WorkerdRuntime(Path(directory), cgroup=f"/atoll-test-{uuid.uuid4().hex[:8]}")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a loop of its own: this one may be running
            try:
                pool.submit(asyncio.run, runtime.probe()).result()
            except Unsupported as error:
                return f"workerd: {error}; {error.mend}"
    return ""


def worker_world(directory: Path, layer: Path) -> WorkerWorld:
    """Return a world of real workers. Skips where there can be none."""
    if why := why_not():
        pytest.skip(why)
    services = directory / "services"
    services.mkdir()
    services.chmod(0o755)
    cgroup = f"/atoll-test-workerd-{uuid.uuid4().hex[:8]}"
    return WorkerWorld(
        directory, lambda: WorkerdRuntime(directory / "runtime", cgroup=cgroup, services=services), layer, cgroup=cgroup
    )
