"""`make demo`: the whole road on real parts, as a user would walk it. Exits 0 only if every step did what it says.

Runs its own Atoll on free ports over a temporary data directory, so it neither needs nor touches another one.
"""

from __future__ import annotations

import http.client
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from every_runtime import Row, answer_of_each, runtime_table
from rich.console import Console
from rich.table import Table

from atoll.entry.scratch import CommandFailed, ScratchAtoll

HERE = Path(__file__).resolve().parent
HOST = "hello.localhost"
console = Console(highlight=False)


class Failed(Exception):
    """A step did not do what it says."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


class Demo:
    """The steps, in order, and what they took in milliseconds."""

    def __init__(self, atoll: ScratchAtoll) -> None:
        self.scratch = atoll
        self.atoll, self.atoll_json = atoll.atoll, atoll.atoll_json
        self.rows: list[tuple[str, float, str]] = []
        self.runtimes: list[Row] = []

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """Time a step and say how it ended; `found` is what the table will say of it."""
        found: list[str] = []
        with console.status(what):
            began = time.perf_counter()
            yield found
            took = (time.perf_counter() - began) * 1000
        self.rows.append((what, took, " ".join(found)))
        console.print(f"[green]✓[/] {what} [dim]{took:,.0f} ms[/] {' '.join(found)}")

    def get(self, hostname: str = HOST, path: str = "/") -> tuple[int, str]:
        """Ask the ingress, by hostname, and return status and body."""
        host, port = self.scratch.ingress.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request("GET", path, headers={"Host": hostname})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def instances(self) -> list[dict[str, Any]]:
        """Return the app's instances that are ready."""
        return [view for view in self.atoll_json("ps") if (view.get("status") or {}).get("ready")]

    def walk(self) -> None:
        with self.step("start `atoll up`: server, agent, ingress, SQLite") as found:
            self.scratch.start()
            found.append(f"API {self.scratch.api}, ingress {self.scratch.ingress}")
        with self.step("build the image of examples/hello") as found:
            built = self.atoll_json("build", str(HERE / "hello"))
            found.append(str(built["image"]))
        with self.step("deploy it with two replicas") as found:
            self.atoll("deploy", str(HERE / "hello"), "--image", str(built["image"]))
            ready = self.instances()
            expect(len(ready) == 2, f"{len(ready)} of 2 replicas are ready")
            found.append(" ".join(view["instance"]["id"] for view in ready))
        with self.step("call it through the ingress by hostname") as found:
            answers = {self.answer() for _ in range(20)}
            expect(len(answers) == 2, f"20 requests reached {len(answers)} of 2 replicas")
            found.append(f"http://{HOST}:{self.scratch.ingress.rsplit(':', 1)[1]}/ answered by both")
        with self.step("run a command inside with `atoll exec`") as found:
            text = self.atoll("exec", "hello", "--", "python3", "-c", "import os; print(os.getuid(), os.environ['ATOLL_APP'])")
            expect(text.split() == ["0", "hello"] or text.split()[1:] == ["hello"], f"exec printed {text!r}")
            found.append(f"printed {text.strip()!r}")
        with self.step("read its logs") as found:
            lines = self.atoll("logs", "hello", "--tail", "50").splitlines()
            expect(any("GET /" in line for line in lines), "no request is in the logs")
            found.append(f"{len(lines)} lines")
        with self.step("kill one replica's process; it is replaced, no request fails") as found:
            found.append(self.kill_one())
        with self.step("replace both with `atoll restart` under load; no request fails") as found:
            found.append(self.replace())
        with self.step("delete the app") as found:
            self.atoll("delete", "hello", "--yes")
            wait_for(lambda: not self.atoll_json("ps"), "instances are left after the delete")
            status, _ = self.get()
            expect(status == 404, f"the ingress answers {status} for a deleted app")
            found.append("ingress answers 404")
        with self.step("deploy it on every runtime of this machine, and ask each through the ingress") as found:
            found.append(self.every_runtime(str(built["image"])))

    def answer(self) -> str:
        status, body = self.get()
        expect(status == 200, f"the ingress answered {status}: {body[:200]}")
        return body

    def kill_one(self) -> str:
        victim = self.instances()[0]
        before = victim["status"]
        with Load(self.get) as load:
            os.kill(before["pid"], signal.SIGKILL)
            killed = time.perf_counter()

            def replaced() -> bool:
                now = next((v for v in self.instances() if v["instance"]["id"] == victim["instance"]["id"]), None)
                return now is not None and now["status"]["pid"] != before["pid"]

            wait_for(replaced, "the killed replica did not come back")
            took = (time.perf_counter() - killed) * 1000
        expect(not load.failures, f"{len(load.failures)} of {load.total} requests failed: {load.failures[:3]}")
        return f"pid {before['pid']} → new process ready after ≤ {took:,.0f} ms; {load.total} requests, 0 failed"

    def replace(self) -> str:
        old = {view["instance"]["id"] for view in self.instances()}
        with Load(self.get) as load:
            self.atoll("restart", "hello")
            wait_for(
                lambda: len(now := {v["instance"]["id"] for v in self.instances()}) == 2 and not now & old,
                "the old instances were not replaced",
            )
        expect(not load.failures, f"{len(load.failures)} of {load.total} requests failed: {load.failures[:3]}")
        return f"2 of 2 replaced; {load.total} requests, 0 failed"

    def every_runtime(self, image: str) -> str:
        """Leave them running: what ends `atoll up` has something of every kind to clean up."""
        for row in answer_of_each(self.scratch, image, self.get):
            self.runtimes.append(row)
            time_words = "" if row.cold_start_ms is None else f"[dim]{row.cold_start_ms:,.0f} ms[/] "
            mark = "[red]✗[/]" if row.failed else "[dim]–[/]" if row.why_not else "[green]✓[/]"
            console.print(f"  {mark} {row.runtime} {time_words}", end="")
            console.print(row.answer or row.why_not, markup=False)
        failed = [row.runtime for row in self.runtimes if row.failed]
        expect(not failed, f"no answer from {', '.join(failed)}")
        answered = sum(1 for row in self.runtimes if row.answer)
        return f"{answered} of {len(self.runtimes)} answered, each cold start below"

    def stop(self) -> None:
        """End what this demo started, and see that nothing is left of it."""
        with self.step("stop `atoll up` and clean up") as found:
            self.scratch.stop()
            mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.scratch.data) in line]
            expect(not mounts, f"mounts are left: {mounts[:3]}")
            found.append("no mount left")

    def table(self) -> Table:
        table = Table(title="make demo", title_justify="left")
        table.add_column("step")
        table.add_column("ms", justify="right")
        table.add_column("what happened", overflow="fold")
        for what, took, found in self.rows:
            table.add_row(what, f"{took:,.0f}", found)
        return table


class Load:
    """One client that sends request after request while the block runs, each on a new connection."""

    def __init__(self, get: Callable[[], tuple[int, str]]) -> None:
        self._get = get
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.total = 0
        self.failures: list[str] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            self.total += 1
            try:
                status, body = self._get()
                if status != 200:
                    self.failures.append(f"{status} {body[:100]}")
            except OSError as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(15)


def wait_for(holds: Callable[[], bool], otherwise: str, *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        expect(time.monotonic() < deadline, f"{otherwise} within {seconds:.0f} s")
        time.sleep(0.05)


def main() -> int:
    scratch = ScratchAtoll("atoll-demo-")
    demo = Demo(scratch)
    failed = False
    for part in (demo.walk, demo.stop):
        try:
            part()
        except (Failed, CommandFailed) as error:
            failed = True
            console.print(f"[red]✗[/] {error}")
    if failed:
        console.print("".join(scratch.log.splitlines(keepends=True)[-40:]), markup=False)
    console.print(demo.table())
    if demo.runtimes:
        console.print(runtime_table(demo.runtimes))
    with console.status("removing its data"):
        scratch.remove()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
