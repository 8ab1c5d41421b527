"""Workers on a real `atoll up`: deployed from a directory, answering by hostname, bound to each other, contained."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.entry.scratch import CommandFailed, ScratchAtoll
from atoll.model.errors import Unsupported
from atoll.runtimes.workerd_root import find_workerd

EXAMPLE = Path(__file__).parents[2] / "examples" / "worker"
ANSWER_S_MAX = 20.0


def _why_not() -> str:
    try:
        find_workerd("workerd")
    except Unsupported as error:
        return f"{error}; {error.mend}"
    return ""


pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "-"),
]


@pytest.fixture(scope="module")
def atoll() -> Iterator[ScratchAtoll]:
    with ScratchAtoll("atoll-workers-") as atoll:
        atoll.atoll("deploy", str(EXAMPLE))
        atoll.atoll("deploy", str(EXAMPLE / "front"))
        yield atoll


def ask(atoll: ScratchAtoll, app: str, path: str, *, body: bytes | None = None, timeout_s: float = ANSWER_S_MAX) -> tuple[int, str]:
    host, _, port = atoll.ingress.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request("GET" if body is None else "PUT", path, body, {"Host": f"{app}.localhost"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def count(atoll: ScratchAtoll, app: str, name: str) -> int:
    status, body = ask(atoll, app, f"/count/{name}")
    assert status == 200, body
    found: int = json.loads(body)["count"]
    return found


def write(directory: Path, name: str, code: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "index.js").write_text(code)
    (directory / "wrangler.jsonc").write_text(
        f'{{ // as wrangler has it\n"name": "{name}", "main": "index.js", "compatibility_date": "2026-11-01", }}'
    )
    return directory


def wait_for(what: Callable[[], Any], words: str, deadline_s: float = 60.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s for {words}"
        time.sleep(0.1)


def pids(atoll: ScratchAtoll, app: str) -> list[int]:
    views = atoll.atoll_json("ps", app)
    return [view["status"]["pid"] for view in views if (view.get("status") or {}).get("ready")]


def test_a_wrangler_toml_deployed_as_it_is_answers_by_its_hostname(atoll: ScratchAtoll) -> None:
    status, body = ask(atoll, "worker", "/")
    assert status == 200
    assert body.startswith("hello from a worker\n")
    assert ask(atoll, "worker", "/notes/first", body=b"a note") == (200, "kept\n")
    assert ask(atoll, "worker", "/notes/first") == (200, "a note")
    wait_for(lambda: "asked for the page" in atoll.atoll("logs", "worker"), "what it logged")
    (row,) = [row for row in atoll.atoll_json("runtimes") if row["runtime"] == "workerd"]
    assert row["nodes"]
    assert set(row["features"]) == {"pause", "files"}


def test_a_worker_reaches_another_by_its_binding(atoll: ScratchAtoll) -> None:
    before = count(atoll, "worker", "bound")
    assert count(atoll, "front", "bound") == before + 1


def test_a_durable_object_goes_on_counting_after_its_process_was_killed(atoll: ScratchAtoll) -> None:
    before = count(atoll, "front", "killed")
    (pid,) = pids(atoll, "worker")
    os.kill(pid, 9)
    wait_for(lambda: ask(atoll, "front", "/")[0] == 200 and pids(atoll, "worker") not in ([pid], []), "the worker to be back")
    assert count(atoll, "front", "killed") == before + 1


def test_a_worker_with_state_is_not_made_twice(atoll: ScratchAtoll) -> None:
    with pytest.raises(CommandFailed, match="it runs once") as raised:
        atoll.atoll("scale", "worker", "2")
    assert "mend:" in raised.value.stderr


def test_a_command_in_a_worker_is_refused_with_the_runtimes_that_could(atoll: ScratchAtoll) -> None:
    (view,) = atoll.atoll_json("ps", "worker")
    with pytest.raises(CommandFailed, match="workerd has no exec"):
        atoll.atoll("exec", view["instance"]["id"], "--", "ls")


def test_a_new_release_of_a_worker_costs_no_request(atoll: ScratchAtoll, tmp_path: Path) -> None:
    code = "export default {{ fetch() {{ return new Response('release {}'); }} }};"
    atoll.atoll("deploy", str(write(tmp_path / "live", "live", code.format(1))))
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            seen.append(ask(atoll, "live", "/"))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        atoll.atoll("deploy", str(write(tmp_path / "live", "live", code.format(2))))
        wait_for(lambda: seen[-1][1] == "release 2", "the new release")
        wait_for(lambda: len(pids(atoll, "live")) == 1 and len(atoll.atoll_json("ps", "live")) == 1, "the old one to go")
    finally:
        stop.set()
        thread.join()
    assert set(seen) == {(200, "release 1"), (200, "release 2")}


def test_a_syntax_error_fails_the_deployment_with_its_place(atoll: ScratchAtoll, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as raised:
        atoll.atoll("deploy", str(write(tmp_path / "syntax", "syntax", "export default {\n  fetch( {\n")))
    assert "Uncaught SyntaxError: Unexpected end of input" in raised.value.stderr
    assert "at index.js:3" in raised.value.stderr
    assert "exited with status 1" in raised.value.stderr
    (view,) = atoll.atoll_json("ps", "syntax")
    assert view["status"]["phase"] in {"backoff", "starting", "running"}
    assert not view["status"].get("ready")
    atoll.atoll("delete", "syntax", "--yes")


def test_an_endless_loop_is_ended_and_the_others_serve_meanwhile(atoll: ScratchAtoll, tmp_path: Path) -> None:
    code = "export default { fetch(r) { if (new URL(r.url).pathname === '/loop') for (;;); return new Response('ok'); } };"
    atoll.atoll("deploy", str(write(tmp_path / "loop", "loop", code)))
    (pid,) = pids(atoll, "loop")
    with pytest.raises(TimeoutError):
        ask(atoll, "loop", "/loop", timeout_s=1)
    assert ask(atoll, "worker", "/")[0] == 200
    wait_for(lambda: pids(atoll, "loop") not in ([pid], []), "a new process")
    assert ask(atoll, "loop", "/") == (200, "ok")
    assert "failed its health check" in atoll.atoll("events")
    atoll.atoll("delete", "loop", "--yes")


def test_a_memory_bomb_is_ended_and_the_others_serve_meanwhile(atoll: ScratchAtoll, tmp_path: Path) -> None:
    code = """export default { fetch(r) {
      if (new URL(r.url).pathname === "/bomb") { const all = []; for (;;) all.push(new Uint8Array(1e6).fill(1)); }
      return new Response("ok");
    } };"""
    atoll.atoll("deploy", str(write(tmp_path / "bomb", "bomb", code)))
    (pid,) = pids(atoll, "bomb")
    assert ask(atoll, "bomb", "/bomb")[0] >= 500
    assert ask(atoll, "worker", "/")[0] == 200
    wait_for(lambda: pids(atoll, "bomb") not in ([pid], []), "a new process")
    wait_for(lambda: "out-of-memory" in atoll.atoll("events"), "word of it")
    assert ask(atoll, "bomb", "/") == (200, "ok")
    atoll.atoll("delete", "bomb", "--yes")


def write_shared(directory: Path, name: str, code: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "index.js").write_text(code)
    (directory / "atoll.toml").write_text(
        f'name = "{name}"\n[resources]\nmemory = "32MiB"\n[worker]\nmain = "index.js"\n'
        f'compatibility_date = "2026-11-01"\nshared = true\n[[worker.services]]\nbinding = "BACKEND"\napp = "worker"\n'
    )
    return directory


def test_shared_workers_are_one_process_and_a_release_of_one_costs_no_request_of_another(
    atoll: ScratchAtoll, tmp_path: Path
) -> None:
    code = """export default {{ fetch(r, env) {{
      return r.url.endsWith("/out") ? env.BACKEND.fetch("http://backend/") : new Response("{}");
    }} }};"""
    for name in ("one", "two"):
        atoll.atoll("deploy", str(write_shared(tmp_path / name, name, code.format(name))))
    assert pids(atoll, "one")
    assert ask(atoll, "two", "/") == (200, "two")
    assert ask(atoll, "one", "/out")[1].startswith("hello from a worker")
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            seen.append(ask(atoll, "one", "/"))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for release in ("two again", "two at last"):
            atoll.atoll("deploy", str(write_shared(tmp_path / "two", "two", code.format(release))))
            wait_for(lambda release=release: ask(atoll, "two", "/") == (200, release), "the new release")
        wait_for(lambda: len(atoll.atoll_json("ps", "two")) == 1, "the old one to go")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) == {(200, "one")}


def test_a_shared_worker_that_loops_is_named_by_its_event_and_the_other_is_served(atoll: ScratchAtoll, tmp_path: Path) -> None:
    code = "export default { fetch(r) { if (new URL(r.url).pathname === '/loop') for (;;); return new Response('ok'); } };"
    for name in ("guilty", "bystander"):
        atoll.atoll("deploy", str(write_shared(tmp_path / name, name, code)))
    with pytest.raises(TimeoutError):
        ask(atoll, "guilty", "/loop", timeout_s=1)
    assert ask(atoll, "bystander", "/", timeout_s=30) == (200, "ok")  # its sockets stay open: who comes meanwhile waits
    wait_for(lambda: "it runs apart from now on" in atoll.atoll("events"), "word of it")
    wait_for(lambda: ask(atoll, "guilty", "/") == (200, "ok"), "it to be back")
    (view,) = atoll.atoll_json("ps", "bystander")
    assert view["status"].get("restarts", 0) == 0
    wait_for(lambda: "did not answer; it is served again" in atoll.atoll("logs", "bystander"), "its own log to say so")
