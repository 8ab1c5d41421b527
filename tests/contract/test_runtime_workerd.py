"""What every runtime promises, as far as it makes sense for a worker; what a worker is beside that; and what its jail keeps in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from worker_world import ALIVE, BOUND, MODULES_OF_CODE, PORT, STATEFUL, WorkerWorld, ask_here, make_modules, worker_world

from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import Limits
from atoll.model.units import Seconds
from atoll.model.worker import SERVICES_SOCKET, Assets, NotFoundHandling, Queue
from atoll.network.namespaces import run_inside
from atoll.runtimes.workerd import WorkerdRuntime

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_modules(tmp_path_factory.mktemp("modules"), MODULES_OF_CODE)


@pytest.fixture
async def world(layer: Path, tmp_path: Path) -> AsyncIterator[WorkerWorld]:
    world = worker_world(tmp_path, layer)
    yield world
    await world.close()


def image_of(directory: Path, modules: dict[str, str]) -> Image:
    return Image(reference="x", digest="sha256:1", config=ImageConfig(), layers=(make_modules(directory, modules),))


async def test_a_worker_answers_with_its_modules_and_its_bindings(world: WorkerWorld) -> None:
    env = (("GREETING", "hi"), ("TOKEN", "secret"), ("LD_PRELOAD", "/evil.so"), ("PATH", "/image"))
    pid = await world.serve(
        "a", env=env, bindings=("GREETING", "TOKEN", "LD_PRELOAD"), worker={"vars": {"LIST": [1, 'a "quoted" word\n'], "TEXT": "é"}}
    )
    status, body = await world.ask(pid, "/env")
    assert status == 200
    assert json.loads(body) == {
        "GREETING": "hi",
        "TOKEN": "secret",
        "LD_PRELOAD": "/evil.so",
        "LIST": [1, 'a "quoted" word\n'],
        "TEXT": "é",
    }
    assert json.loads((await world.ask(pid, "/modules"))[1]) == ["a note", [1, 2], 42]
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert not [line for line in variables if line.startswith("LD_")]
    assert "secret" not in (world.directory / "instances/a/worker.capnp").read_text()


async def test_what_a_worker_logs_comes_through_the_fifos(world: WorkerWorld) -> None:
    pid = await world.serve("a")
    await world.ask(pid, "/log")
    assert await world.output_until("a", "to the log") == "to the log\n"
    assert "to the errors\n" in world.output("a", "stderr")


async def test_a_stop_signal_ends_a_worker_in_good_order(world: WorkerWorld) -> None:
    await world.serve("a")
    await world.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_a_worker_in_an_endless_loop_hears_nothing_and_is_killed(world: WorkerWorld) -> None:
    pid = await world.serve("a")
    with pytest.raises(OSError, match="timed out"):
        await world.ask(pid, "/loop", timeout_s=0.3)
    with pytest.raises(OSError, match="timed out"):  # this is what the node's check of health sees
        await world.ask(pid, "/", port=ALIVE, timeout_s=0.3)
    await world.runtime.kill("a")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 137


async def test_an_endless_loop_has_no_more_than_its_share_of_the_processor(world: WorkerWorld) -> None:
    limits = Limits(cpu_milli=200, memory_bytes=128 << 20, disk_bytes=64 << 20, pids=64)
    pid = await world.serve("a", limits=limits)
    with pytest.raises(OSError, match="timed out"):
        await world.ask(pid, "/loop", timeout_s=0.2)
    await world.runtime.usage("a")
    await asyncio.sleep(1.0)
    assert 0 < (await world.runtime.usage("a")).cpu_milli < 400


@pytest.mark.parametrize("path", ["/heap", "/buffers"])
async def test_a_memory_bomb_ends_its_own_process_only(world: WorkerWorld, path: str) -> None:
    other = await world.serve("other")
    pid = await world.serve("a")
    with pytest.raises(OSError, match=r"."):
        await world.ask(pid, path)
    end = await asyncio.wait_for(world.runtime.wait("a"), 10)
    assert end.code != 0
    assert end.oom or "heap out of memory" in world.output("a", "stderr")
    assert (await world.ask(other, "/"))[1] == "hello"


async def test_memory_stays_within_small_bounds_however_many_requests_come(world: WorkerWorld) -> None:
    """Without full collections these requests alone leave 50 MiB behind."""
    limits = Limits(cpu_milli=2000, memory_bytes=64 << 20, disk_bytes=64 << 20, pids=64)
    pid = await world.serve("a", limits=limits)

    def ask_all() -> set[tuple[int, str]]:
        return {ask_here("/", PORT, 10.0) for _ in range(6000)}

    assert await asyncio.to_thread(run_inside, Path(f"/proc/{pid}/ns/net"), ask_all) == {(200, "hello")}
    assert (await world.runtime.usage("a")).memory_bytes < 56 << 20


async def test_a_syntax_error_ends_the_worker_with_one_line_that_says_where(world: WorkerWorld, tmp_path: Path) -> None:
    image = image_of(tmp_path / "bad", {"index.js": "export default {\n  fetch( {\n"})
    await world.begin("a", image=image)
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 1
    said = [line for line in world.output("a", "stderr").splitlines() if "bootstrap compile cache" not in line]
    assert said[0] == "service main: Uncaught SyntaxError: Unexpected end of input"
    assert "index.js:3" in said[1]


async def test_an_exception_at_the_top_of_a_module_ends_the_worker_with_its_words(world: WorkerWorld, tmp_path: Path) -> None:
    code = "throw new Error('no table'); export default {};"
    await world.begin("a", image=image_of(tmp_path / "bad", {"index.js": code}))
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 1
    assert "Uncaught Error: no table" in world.output("a", "stderr")


@pytest.mark.parametrize("modules", [{"other.js": ""}, {"../elsewhere/index.js": ""}])
async def test_an_image_without_the_main_module_is_refused_and_leaves_nothing(
    world: WorkerWorld, tmp_path: Path, modules: dict[str, str]
) -> None:
    box = world.worker_box("a", image=image_of(tmp_path / "image", modules))
    with pytest.raises(Invalid, match=r"the image has no /worker/index\.js"):
        await world.runtime.create(box)
    assert not box.directory.exists()
    assert await world.runtime.recover() == []


async def test_a_link_among_the_modules_leads_nowhere(world: WorkerWorld, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", {"index.js": "export default { fetch() { return new Response('ok'); } };"})
    (image.layers[0] / "worker/passwd.txt").symlink_to("/etc/passwd")
    (image.layers[0] / "worker/etc").symlink_to("/etc")
    await world.serve("a", image=image)
    text = (world.directory / "instances/a/worker.capnp").read_text()
    assert "index.js" in text
    assert "passwd" not in text


async def test_what_is_no_worker_is_refused(world: WorkerWorld) -> None:
    with pytest.raises(Invalid, match="worker: missing"):
        await world.runtime.create(world.box("a", "/bin/true"))


async def test_no_command_runs_beside_a_worker_and_the_error_says_where_it_could(world: WorkerWorld) -> None:
    with pytest.raises(NotFound):
        await world.runtime.exec("nobody", ["true"])
    await world.begin("a")
    with pytest.raises(Unsupported, match="workerd has no exec") as raised:
        await world.runtime.exec("a", ["true"])
    assert "runc" in str(raised.value.mend)


async def test_a_paused_worker_answers_once_it_goes_on(world: WorkerWorld) -> None:
    pid = await world.serve("a")
    await world.runtime.pause("a")
    with pytest.raises(OSError, match="timed out"):
        await world.ask(pid, "/", timeout_s=0.3)
    await world.runtime.resume("a")
    assert (await world.ask(pid, "/"))[1] == "hello"


async def test_usage_is_told(world: WorkerWorld) -> None:
    await world.serve("a")
    usage = await world.runtime.usage("a")
    assert usage.memory_bytes > 1 << 20
    assert 1 <= usage.pids <= 8


async def test_files_can_be_read_by_the_root_and_not_written(world: WorkerWorld) -> None:
    await world.serve("a")
    root = await world.runtime.root("a")
    try:
        assert Path(f"/proc/self/fd/{root}/worker/note.txt").read_text() == "a note"
        with pytest.raises(OSError, match="Read-only"):
            os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=root)
    finally:
        os.close(root)


async def test_a_worker_is_made_once_and_deleted_as_often_as_one_likes(world: WorkerWorld) -> None:
    await world.begin("a")
    with pytest.raises(Conflict):
        await world.runtime.create(world.worker_box("b", id="a"))
    for _ in range(2):
        await world.runtime.delete("a")
    assert not (world.directory / "instances/a").exists()


async def test_the_next_agent_adopts_a_worker_that_serves(world: WorkerWorld) -> None:
    pid = await world.serve("a")
    await world.reopen()
    assert [(found.id, found.pid, found.exit) for found in await world.runtime.recover()] == [("a", pid, None)]
    assert (await world.ask(pid, "/"))[1] == "hello"
    await world.runtime.signal("a", "SIGTERM")
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).code == 0


async def test_durable_objects_and_kv_outlive_a_kill_and_the_instance(world: WorkerWorld) -> None:
    pid = await world.serve("a", worker=STATEFUL)
    assert [(await world.ask(pid, "/count"))[1] for _ in range(2)] == ["1", "2"]
    await world.ask(pid, "/keep")
    os.kill(pid, 9)
    assert (await asyncio.wait_for(world.runtime.wait("a"), 10)).signal == "SIGKILL"
    await world.runtime.delete("a")
    pid = await world.serve("b", worker=STATEFUL)  # another range of user ids, the same volume
    assert (await world.ask(pid, "/count"))[1] == "3"
    assert (await world.ask(pid, "/kept"))[1] == "kept"


EVENTFUL = """
const seen = [];
export default {
  async fetch(request, env) {
    if (new URL(request.url).pathname === "/send") await env.MAILS.send({ to: "somebody" });
    return Response.json(seen);
  },
  async queue(batch) {
    for (const message of batch.messages) {
      seen.push([batch.queue, message.body.to, message.attempts]);
      if (batch.queue === "mails") message.retry();
    }
  },
  scheduled(controller) { seen.push(["cron", controller.cron]); },
};
"""
QUEUES = (
    Queue(queue="mails", binding="MAILS", batch_wait=Seconds(0), retries=1, dead_letter="lost"),
    Queue(queue="lost", batch_wait=Seconds(0)),
)


async def until_seen(world: WorkerWorld, pid: int, what: list[object], deadline_s: float = 30.0) -> list[object]:
    deadline = time.monotonic() + deadline_s
    while True:
        seen: list[object] = json.loads((await world.ask(pid, "/"))[1])
        if what in seen:
            return seen
        assert time.monotonic() < deadline, f"{what} did not come, only {seen}"
        await asyncio.sleep(0.1)


async def test_a_queue_s_messages_are_delivered_tried_again_and_given_up_and_outlive_a_kill(
    world: WorkerWorld, tmp_path: Path
) -> None:
    image = image_of(tmp_path / "image", {"index.js": EVENTFUL})
    pid = await world.serve("a", image=image, worker={"queues": QUEUES})
    await world.ask(pid, "/send")
    seen = await until_seen(world, pid, ["lost", "somebody", 1])
    assert [each for each in seen if isinstance(each, list) and each[0] == "mails"] == [
        ["mails", "somebody", 1],
        ["mails", "somebody", 2],
    ]
    slow = tuple(replace(queue, batch_wait=Seconds(3)) for queue in QUEUES)
    pid = await world.serve("b", image=image, worker={"queues": slow})
    await world.ask(pid, "/send")
    os.kill(pid, 9)
    await asyncio.wait_for(world.runtime.wait("b"), 10)
    await world.runtime.delete("b")
    pid = await world.serve("c", image=image, worker={"queues": QUEUES})
    await until_seen(world, pid, ["mails", "somebody", 1])


@pytest.mark.soak
async def test_a_cron_trigger_comes_within_its_minute(world: WorkerWorld, tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", {"index.js": EVENTFUL})
    pid = await world.serve("a", image=image, worker={"crons": ("* * * * *",)})
    await until_seen(world, pid, ["cron", "* * * * *"], deadline_s=90)


async def test_a_cron_expression_that_workerd_cannot_read_is_told_in_its_words(world: WorkerWorld) -> None:
    await world.begin("a", worker={"crons": ("99 * * * *",)})
    said, deadline = "", time.monotonic() + 20
    while "minute field has 99" not in said:
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.05)
        said += world.output("a", "stderr") + world.output("a")


ASSETS = {
    "index.js": "export default { async fetch(r, env) { return new Response(`worker ${(await env.FILES.fetch(r)).status}`); } };",
    "public/index.html": "<h1>home</h1>",
    "public/app.js": "this is no module, and would not load",
    "public/404.html": "not here",
    "public/_redirects": "/old /app.js 301",
}


async def test_files_are_served_as_they_are_and_the_worker_where_it_comes_first(world: WorkerWorld, tmp_path: Path) -> None:
    assets = Assets(directory="public", binding="FILES", not_found=NotFoundHandling.PAGE, worker_first=("/api/*",))
    pid = await world.serve("a", image=image_of(tmp_path / "image", ASSETS), worker={"assets": assets})
    assert await world.ask(pid, "/") == (200, "<h1>home</h1>")
    assert await world.ask(pid, "/app.js") == (200, "this is no module, and would not load")
    assert (await world.ask(pid, "/old"))[0] == 301
    assert await world.ask(pid, "/api/x") == (200, "worker 404")
    assert (await world.ask(pid, "/../index.js"))[1] != ASSETS["index.js"]
    assert (await world.ask(pid, "/_redirects"))[1] != ASSETS["public/_redirects"]


async def test_a_closed_worker_goes_nowhere_and_hears_why(world: WorkerWorld) -> None:
    pid = await world.serve("a", worker={"egress": ()})
    assert (await world.ask(pid, "/out")) == (500, "this worker may go nowhere: its spec says worker.egress = []")


async def test_a_worker_reaches_public_networks_only_unless_its_spec_names_others(world: WorkerWorld) -> None:
    public = await world.serve("a")
    assert (await world.ask(public, "/out"))[0] == 500
    named = await world.serve("b", worker={"egress": ("127.0.0.0/8",)})
    assert (await world.ask(named, "/out"))[0] == 204


@pytest.fixture
def other(world: WorkerWorld) -> Iterator[list[bytes]]:
    """A stand-in for the ingress on its socket; the requests that came."""
    came: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    path = world.directory / "services" / SERVICES_SOCKET
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    came.append(client.recv(65_536))
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nother")

    thread = threading.Thread(target=serve)
    thread.start()
    yield came
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


async def test_a_service_binding_names_the_app_and_a_worker_cannot_name_another(world: WorkerWorld, other: list[bytes]) -> None:
    pid = await world.serve("a", worker={**BOUND, "egress": ()})
    assert await world.ask(pid, "/other") == (200, "other")
    (request,) = other
    assert request.startswith(b"GET /asked?a=1 HTTP/1.1\r\n")
    assert b"Host: any.where\r\n" in request
    assert request.lower().count(b"x-atoll-service:") == 1
    assert b"x-atoll-service: p/other/8000\r\n" in request.lower()


async def test_without_an_ingress_a_binding_waits_for_one(world: WorkerWorld) -> None:
    lonely = WorkerdRuntime(world.directory / "lonely", cgroup=world.cgroup)
    with pytest.raises(Unavailable, match="no ingress"):
        await lonely.create(world.worker_box("a", worker=BOUND))
    await lonely.close()


async def test_the_jail_holds_one_program_no_capability_and_nothing_to_write(world: WorkerWorld, tmp_path: Path) -> None:
    image = image_of(tmp_path / "evil", {"index.js": "export default { fetch() { return new Response('ok'); } };"})
    for name in ("usr/bin/sh", "etc/ld.so.preload", "lib64/ld-linux-x86-64.so.2", "worker.capnp"):
        path = image.layers[0] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the image's own")
    pid = await world.serve("a", image=image)
    root = Path(f"/proc/{pid}/root")
    assert [path.name for path in (root / "usr/bin").iterdir()] == ["workerd"]
    assert not (root / "etc/ld.so.preload").exists()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert {status[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["Uid"].split()[0]) > 65_536
    for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup", "user"):
        assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    mounts = [line.split() for line in (Path(f"/proc/{pid}/mountinfo")).read_text().splitlines()]
    writable = {fields[4] for fields in mounts if "rw" in fields[5].split(",")}
    assert writable <= {"/proc", "/dev", *(path for path in writable if path.startswith(("/dev/", "/proc/")))}
    assert not os.access(root / "sys/kernel", os.F_OK)


async def test_two_workers_share_no_process_no_user_and_no_state(world: WorkerWorld) -> None:
    one, two = await world.serve("a"), await world.serve("b")
    assert one != two
    assert Path(f"/proc/{one}").stat().st_uid != Path(f"/proc/{two}").stat().st_uid
    assert Path(f"/proc/{one}/ns/net").readlink() != Path(f"/proc/{two}/ns/net").readlink()
