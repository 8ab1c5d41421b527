"""Workers that share a process with others of their project: the runtime's promises for each of them, and what keeps them apart."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from worker_world import ALIVE, ANSWER_S_MAX, MODULES_OF_CODE, PORT, WorkerWorld, ask_here, make_modules, why_not

from atoll.model.errors import Conflict, Invalid, Unsupported
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Limits
from atoll.model.worker import Assets
from atoll.network import namespaces
from atoll.runtimes.workerd import WorkerdRuntime

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

LIMITS = Limits(cpu_milli=500, memory_bytes=32 << 20, disk_bytes=64 << 20, pids=64)
APART_S = 2.0


class SharedWorld(WorkerWorld):
    """Each worker has a network of its own, in which `ask_worker` asks it."""

    def __init__(self, directory: Path, layer: Path) -> None:
        cgroup = f"/atoll-test-workerd-{uuid.uuid4().hex[:8]}"
        make = lambda: WorkerdRuntime(directory / "runtime", cgroup=cgroup, apart_s=APART_S)  # noqa: E731
        super().__init__(directory, make, layer, cgroup=cgroup)
        self.networks: dict[str, Path] = {}

    def network(self, id: str) -> Path:
        if id not in self.networks:
            path = namespaces.DIRECTORY / f"atoll-test-shared-{uuid.uuid4().hex[:12]}"
            namespaces.create(path, lambda: subprocess.run(["ip", "link", "set", "lo", "up"], check=True))
            self.networks[id] = path
        return self.networks[id]

    def shared_box(self, id: str, *, project: str = "p", worker: dict[str, Any] | None = None, **changes: Any) -> Any:
        box = self.worker_box(
            id, worker={"shared": True, **(worker or {})}, **{"netns": self.network(id), "limits": LIMITS, **changes}
        )
        return replace(box, worker=replace(box.worker, project=project))

    async def share(self, id: str, **options: Any) -> int:
        """Make and start a worker; return the pid of the process that serves it."""
        await self.runtime.create(self.shared_box(id, **options))
        return (await self.runtime.start(id)).pid

    async def again(self, id: str, **options: Any) -> int:
        """Do what a node does after an instance's end."""
        await self.runtime.delete(id)
        for stream in ("stdout", "stderr"):
            path = self.directory / f"{id}.{stream}"
            os.close(self._readers.pop(path))
            path.unlink()
        return await self.share(id, **options)

    async def ask_worker(self, id: str, path: str = "/", *, port: int = PORT, timeout_s: float = ANSWER_S_MAX) -> tuple[int, str]:
        return await asyncio.to_thread(namespaces.run_inside, self.networks[id], lambda: ask_here(path, port, timeout_s))

    async def count(self, id: str) -> int:
        return (await self.runtime.usage(id)).shared_by

    async def until_shared_by(self, id: str, count: int) -> None:
        deadline = time.monotonic() + 30
        while await self.count(id) != count:
            assert time.monotonic() < deadline, f"{id} shares its process with {await self.count(id) - 1} others, not {count - 1}"
            await asyncio.sleep(0.05)

    async def error_until(self, id: str, text: str) -> str:
        seen, deadline = "", time.monotonic() + 10
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} did not come, only {seen!r}"
            await asyncio.sleep(0.01)
            seen += self.output(id, "stderr")
        return seen

    async def until_gone(self, id: str) -> None:
        """Its network goes with an instance; where it stays, its ports are closed once the last process that had it has ended."""
        deadline = time.monotonic() + 10
        while True:
            try:
                await self.ask_worker(id, timeout_s=1)
            except ConnectionRefusedError:
                return
            except OSError:
                pass  # the last process ends just now
            assert time.monotonic() < deadline, f"{id} is still served"
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        try:
            await super().close()
            assert not list((self.directory / "runtime/shared").glob("*/*"))
        finally:
            for path in self.networks.values():
                namespaces.remove(path)


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_modules(tmp_path_factory.mktemp("modules"), MODULES_OF_CODE)


@pytest.fixture
async def world(layer: Path, tmp_path: Path) -> AsyncIterator[SharedWorld]:
    if why := why_not():
        pytest.skip(why)
    world = SharedWorld(tmp_path, layer)
    yield world
    await world.close()


def image_of(directory: Path, code: str) -> Image:
    layers = (make_modules(directory, {"index.js": code}),)
    return Image(reference="x", digest="sha256:1", config=ImageConfig(), layers=layers)


@contextmanager
def load(world: SharedWorld, id: str, path: str = "/") -> Iterator[list[tuple[int, str]]]:
    """Ask a worker all the time, in turn over one connection that is kept and over new ones."""
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def work() -> None:
        kept = http.client.HTTPConnection("127.0.0.1", PORT, timeout=ANSWER_S_MAX)
        while not stop.is_set():
            for connection in (kept, http.client.HTTPConnection("127.0.0.1", PORT, timeout=ANSWER_S_MAX)):
                connection.request("GET", path)
                answer = connection.getresponse()
                seen.append((answer.status, answer.read().decode()))
            connection.close()
        kept.close()

    def inside() -> None:
        try:
            namespaces.run_inside(world.networks[id], work)
        except (OSError, http.client.HTTPException) as error:
            seen.append((0, repr(error)))

    thread = threading.Thread(target=inside)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


async def test_workers_of_a_project_are_in_one_process_and_see_what_is_their_own_alone(world: SharedWorld, tmp_path: Path) -> None:
    code = "export default { fetch(request, env) { return new Response('b: ' + JSON.stringify(env)); } }; export class Named {};"
    await world.share("a", env=(("TOKEN", "of a"),), bindings=("TOKEN",), worker={"vars": {"N": 1}})
    pid = await world.share("b", env=(("TOKEN", "of b"),), bindings=("TOKEN",), image=image_of(tmp_path / "b", code))
    assert json.loads((await world.ask_worker("a", "/env"))[1]) == {"TOKEN": "of a", "N": 1}
    assert json.loads((await world.ask_worker("a", "/modules"))[1]) == ["a note", [1, 2], 42]
    assert (await world.ask_worker("b"))[1] == 'b: {"TOKEN":"of b"}'
    assert (await world.ask_worker("a", port=ALIVE))[0] == (await world.ask_worker("b", port=ALIVE))[0] == 204
    assert [await world.count(id) for id in ("a", "b")] == [2, 2]
    usage = await world.runtime.usage("a")
    assert usage.memory_bytes > 1 << 20
    root = Path(f"/proc/{pid}/root")
    assert [path.name for path in (root / "usr/bin").iterdir()] == ["workerd"]
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert not os.access(root / "sys/kernel", os.F_OK)
    with pytest.raises(OSError, match="Read-only"):
        (root / "workers/a/new.js").write_text("")


async def test_workers_of_two_projects_are_never_in_one_process(world: SharedWorld) -> None:
    pids = {project: await world.share(project, project=project) for project in ("p", "q")}
    assert len(set(pids.values())) == 2
    assert Path(f"/proc/{pids['p']}").stat().st_uid != Path(f"/proc/{pids['q']}").stat().st_uid
    again = await world.share("p2", project="p")
    assert again not in pids.values()
    assert [await world.count(id) for id in ("p", "p2", "q")] == [2, 2, 1]
    for pid, stranger in ((again, "q"), (pids["q"], "p")):
        assert not (Path(f"/proc/{pid}/root/workers") / stranger).exists()


async def test_workers_come_and_go_and_not_one_request_of_the_others_fails(world: SharedWorld, tmp_path: Path) -> None:
    slow = "export default { async fetch() { await scheduler.wait(1500); return new Response('slow'); } };"
    await world.share("slow", image=image_of(tmp_path / "slow", slow))
    first = await world.share("a")
    with load(world, "a") as seen:
        asked = asyncio.create_task(world.ask_worker("slow"))
        await asyncio.sleep(0.1)
        for id in ("b", "c"):
            await world.share(id)
        await world.runtime.signal("b", "SIGTERM")
        assert (await asyncio.wait_for(world.runtime.wait("b"), 20)).code == 0
        await world.again("b")
        last = await world.runtime.recover()
        assert await asked == (200, "slow")
    assert {found.pid for found in last if found.pid} != {first}
    assert set(seen) == {(200, "hello")}
    assert len(seen) > 20


async def test_what_each_writes_and_fails_at_is_in_its_own_log(world: SharedWorld, tmp_path: Path) -> None:
    code = """export default { async fetch(request, env, ctx) {
      console.log("of b: %d\\nand more", 5, { a: 1 });
      process.stdout.write("on stdout\\n");
      ctx.waitUntil(scheduler.wait(1).then(() => { throw new TypeError("too late"); }));
      throw new Error("broken");
    } };"""
    await world.share("a")
    await world.share("b", image=image_of(tmp_path / "b", code))
    assert (await world.ask_worker("b"))[0] == 500
    assert (await world.ask_worker("a", "/log"))[0] == 200
    assert await world.output_until("b", "on stdout") == "of b: 5\nand more { a: 1 }\non stdout\n"
    said = await world.error_until("b", "too late")
    assert "Uncaught Error: broken" in said
    assert "at Object.fetch (index.js:5" in said
    assert await world.output_until("a", "to the log") == "to the log\n"
    assert world.output("a", "stderr") == "to the errors\n"


async def test_one_that_does_not_load_ends_with_its_place_and_the_others_serve_on(world: SharedWorld, tmp_path: Path) -> None:
    pid = await world.share("a")
    await world.share("bad", image=image_of(tmp_path / "bad", "export default {\n  fetch( {\n"))
    end = await asyncio.wait_for(world.runtime.wait("bad"), 10)
    assert end.code == 1
    assert (await world.error_until("bad", "index.js:3")).startswith("Uncaught SyntaxError: Unexpected end of input")
    assert Path(f"/proc/{pid}").exists()
    assert (await world.ask_worker("a"))[1] == "hello"
    await world.again("bad", image=image_of(tmp_path / "good", "export default { fetch() { return new Response('good'); } };"))
    assert (await world.ask_worker("bad"))[1] == "good"


async def test_a_loop_is_told_from_the_others_which_are_served_again_while_it_runs_apart(world: SharedWorld) -> None:
    for id in ("a", "b", "c"):
        await world.share(id)
    with pytest.raises(OSError, match="timed out"):
        await world.ask_worker("b", "/loop", timeout_s=0.5)
    end = await asyncio.wait_for(world.runtime.wait("b"), 30)
    assert end.signal == "SIGKILL"
    assert "shares with 2 other workers" in end.why
    assert (await world.ask_worker("a"))[1] == (await world.ask_worker("c"))[1] == "hello"
    assert [await world.count(id) for id in ("a", "c")] == [2, 2]
    assert "did not answer; it is served again" in await world.error_until("a", "served again")
    await world.again("b")
    assert [await world.count(id) for id in ("a", "b", "c")] == [2, 1, 2]
    with load(world, "a") as seen:
        await world.until_shared_by("b", 3)  # it has done nothing wrong for a while
    assert (await world.ask_worker("b"))[1] == "hello"
    assert set(seen) == {(200, "hello")}


async def test_a_memory_bomb_ends_alone_once_all_run_apart(world: SharedWorld) -> None:
    for id in ("a", "b"):
        await world.share(id)
    for id in ("a", "b"):
        assert (await world.ask_worker(id))[1] == "hello"
    with pytest.raises(OSError, match=r"."):
        await world.ask_worker("b", "/buffers")
    await world.until_shared_by("a", 1)
    assert (await world.ask_worker("a"))[1] == "hello"
    assert "went over its memory limit" in await world.error_until("a", "runs apart")
    with pytest.raises(OSError, match=r"."):
        await world.ask_worker("b", "/buffers")
    assert (await asyncio.wait_for(world.runtime.wait("b"), 10)).oom
    assert (await world.ask_worker("a"))[1] == "hello"


async def test_the_next_agent_adopts_them_all_with_their_sockets(world: SharedWorld) -> None:
    for id in ("a", "b"):
        pid = await world.share(id)
    with load(world, "a") as seen:
        await world.reopen()
        found = {each.id: each.pid for each in await world.runtime.recover()}
        assert found == {"a": pid, "b": pid}
        await world.share("c")
        assert [await world.count(id) for id in ("a", "b", "c")] == [3, 3, 3]
        await world.runtime.signal("b", "SIGTERM")
        assert (await asyncio.wait_for(world.runtime.wait("b"), 20)).code == 0
    assert set(seen) == {(200, "hello")}
    assert (await world.ask_worker("a", "/log"))[0] == 200
    assert await world.output_until("a", "to the log") == "to the log\n"


async def test_a_process_that_is_killed_takes_no_instance_with_it(world: SharedWorld) -> None:
    for id in ("a", "b"):
        pid = await world.share(id)
    os.kill(pid, 9)
    # Their sockets are open all the while, so whoever comes now waits, and is answered.
    assert (await world.ask_worker("a"))[1] == (await world.ask_worker("b"))[1] == "hello"
    await world.until_shared_by("a", 2)


async def test_one_is_killed_and_deleted_and_the_others_stay(world: SharedWorld) -> None:
    for id in ("a", "b"):
        await world.share(id)
    with pytest.raises(Conflict):
        await world.runtime.create(replace(world.shared_box("c"), id="a"))
    await world.runtime.kill("b")
    end = await asyncio.wait_for(world.runtime.wait("b"), 10)
    assert (end.code, end.signal) == (137, "SIGKILL")
    for _ in range(2):
        await world.runtime.delete("b")
    assert not (world.directory / "instances/b").exists()
    assert (await world.ask_worker("a"))[1] == "hello"
    await world.until_gone("b")


async def test_each_serves_files_of_its_own(world: SharedWorld, tmp_path: Path) -> None:
    for id in ("a", "b"):
        code = "export default { fetch() { return new Response('worker'); } };"
        layers = (make_modules(tmp_path / id, {"index.js": code, "public/file.txt": f"of {id}", "public/x.js": "no module"}),)
        image = Image(reference="x", digest="sha256:4", config=ImageConfig(), layers=layers)
        await world.share(id, image=image, worker={"assets": Assets(directory="public")})
    assert [await world.ask_worker(id, "/file.txt") for id in ("a", "b")] == [(200, "of a"), (200, "of b")]
    assert await world.ask_worker("a", "/else") == (200, "worker")


async def test_what_cannot_be_done_to_one_alone_is_refused(world: SharedWorld, tmp_path: Path) -> None:
    await world.share("a")
    for call in (world.runtime.pause, world.runtime.resume):
        with pytest.raises(Unsupported, match="shares its process"):
            await call("a")
    with pytest.raises(Unsupported, match="workerd has no exec"):
        await world.runtime.exec("a", ["true"])
    with pytest.raises(Unsupported, match="shares its process"):
        await world.runtime.snapshot("a", tmp_path / "snapshot")
    root = await world.runtime.root("a")
    try:
        assert Path(f"/proc/self/fd/{root}/worker/note.txt").read_text() == "a note"
        with pytest.raises(OSError, match="Read-only"):
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=root)
    finally:
        os.close(root)


async def test_modules_come_from_all_layers_and_no_link_of_an_image_leads_out_of_it(world: SharedWorld, tmp_path: Path) -> None:
    lower = make_modules(tmp_path / "lower", {"index.js": "export default {};", "text.txt": "below"})
    code = "import text from './text.txt'; export default { fetch() { return new Response(text); } };"
    upper = make_modules(tmp_path / "upper", {"index.js": code})
    (upper / "worker/passwd.txt").symlink_to("/etc/passwd")
    (upper / "worker/etc").symlink_to("/etc")
    image = Image(reference="x", digest="sha256:2", config=ImageConfig(), layers=(lower, upper))
    await world.share("a", image=image)
    assert (await world.ask_worker("a"))[1] == "below"
    assert sorted(path.name for path in (world.directory / "instances/a/root/worker").iterdir()) == ["index.js", "text.txt"]
    box = world.shared_box("b", image=Image(reference="x", digest="sha256:3", config=ImageConfig(), layers=(tmp_path / "none",)))
    (tmp_path / "none").mkdir()
    with pytest.raises(Invalid, match=r"the image has no /worker/index\.js"):
        await world.runtime.create(box)
    assert not box.directory.exists()
