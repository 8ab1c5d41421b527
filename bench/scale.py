"""How big a cell may be: real servers over a real etcd, agents that speak the real protocol, the machine's own cores for all of it.

Phases: nodes join; apps are deployed until all instances run; steady state with people at the API; a second server is ready; the
server that leads killed, again and again, each time with another ready. With `--spread` there are two servers from the beginning,
and the agents spread over them as real ones do: each beats to both, so that both cost what the one does. Every process's processor
time and memory is told apart, so that what the load itself costs is not ours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from atoll.entry.scratch import free_port
from atoll.sdk.http import HttpTransport
from atoll.store.etcd.private import PrivateEtcd
from bench import precedence
from bench.report import Report, Result, percentile
from bench.scale_user import Api, People, app_body

NODES = 5_000
INSTANCES = 100_000
APPS = 1_000
PROJECTS = 20
STEADY_S = 60.0
SETTLE_S = 10.0
"""Between the last instance and the measuring of the steady state."""
CHANGES_PER_MIN = 0.01
"""Share of the instances whose status changes in a minute."""
PHASE_S = 600.0
"""The longest time for one phase."""
STEP_S = 0.25
TOKENS_AT_ONCE = 32
OPEN_FILES = 65_536
TAKEOVERS = 3
READY_S = 10.0
"""From a server's start until the other is killed: it has loaded what there is, and is ready to lead."""
TICKS = os.sysconf("SC_CLK_TCK")


class TooSlow(Exception):
    """A phase did not come to its end in time; the message says how far it got."""


class Watched:
    """A process whose use of the machine is measured."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ticks = self._used()
        self.kernel_s = 0.0
        self._at = time.perf_counter()

    def _used(self) -> tuple[int, int]:
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0, 0
        return int(fields[11]) + int(fields[12]), int(fields[12])

    def take(self) -> tuple[float, float]:
        """Return processor seconds and seconds since the last take; `kernel_s` is what of them was the kernel's."""
        (ticks, kernel), at = self._used(), time.perf_counter()
        used, passed = (ticks - self._ticks[0]) / TICKS, at - self._at
        self.kernel_s = (kernel - self._ticks[1]) / TICKS
        self._ticks, self._at = (ticks, kernel), at
        return used, passed

    def rss_mib(self, what: str = "VmRSS") -> float:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
                if line.startswith(what + ":"):
                    return int(line.split()[1]) / 1024
        return 0.0


class Server:
    """One `atoll server`."""

    def __init__(self, work: Path, number: int, store: str, key: Path | None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.data = work / f"server{number}"
        self.log = work / f"server{number}.log"
        self._command = [sys.executable, "-m", "atoll.entry.server", f"--data={self.data}", f"--api={self.address}"]
        self._command += [f"--store={store}", f"--node=bench{number}", "--log-json"]
        if key is not None:
            self._command.append(f"--key={key}")
        self.process: subprocess.Popen[bytes] | None = None
        self.used: Watched

    @property
    def key(self) -> Path:
        return self.data / "server" / "key"

    @property
    def token(self) -> str:
        return (self.data / "server" / "admin-token").read_text().strip()

    async def start(self) -> float:
        """Return how long it took until the API answered."""
        began = time.perf_counter()
        with self.log.open("ab") as log:
            command = ["setpriv", "--pdeathsig=KILL", *self._command]
            self.process = await asyncio.to_thread(subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.used = Watched(self.process.pid)
        transport = HttpTransport(f"http://{self.address}")
        async with asyncio.timeout(PHASE_S):
            while True:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended:\n{self.log.read_text()[-3000:]}")
                with contextlib.suppress(Exception):
                    answer = await transport.request("GET", "/healthz", timeout_s=2.0)
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.1)
        await transport.close()
        return time.perf_counter() - began

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10.0)


class Drivers:
    """The processes that hold the agents."""

    def __init__(self, servers: list[str], tokens: list[str], count: int, words: list[str]) -> None:
        self.total = len(tokens)
        self._processes: list[subprocess.Popen[str]] = []
        self.used: list[Watched] = []
        each = -(-len(tokens) // count)
        for first in range(0, len(tokens), each):
            part = tokens[first : first + each]
            command = [sys.executable, "-m", "bench.scale_agents", ",".join(servers), str(first), str(len(part))]
            process = subprocess.Popen([*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdin is not None
            process.stdin.write("".join(f"{token}\n" for token in part))
            process.stdin.flush()
            self._processes.append(process)
            self.used.append(Watched(process.pid))

    async def ask(self, word: str = "look") -> dict[str, Any]:
        """Return the sum of what they say."""
        answers = await asyncio.gather(*(asyncio.to_thread(_ask, process, word) for process in self._processes))
        total: dict[str, Any] = {}
        for answer in answers:
            for name, value in answer.items():
                if isinstance(value, dict):
                    held = total.setdefault(name, {})
                    for key, count in value.items():
                        held[key] = held.get(key, 0) + count
                else:
                    total[name] = total[name] + value if name in total else value
        return total

    async def until(self, what: str, **least: int) -> dict[str, Any]:
        """Return what they say once all of `least` are reached. Raises TooSlow."""
        deadline = time.monotonic() + PHASE_S
        said_at = time.monotonic()
        while True:
            answer = await self.ask()
            if all(answer[name] >= value for name, value in least.items()):
                return answer
            if time.monotonic() > said_at + 10.0:
                said_at = time.monotonic()
                _say(f"{what}: { ({name: answer[name] for name in least}) } errors {answer['errors']}")
            if time.monotonic() > deadline:
                raise TooSlow(
                    f"{what}: after {PHASE_S:.0f} s { ({name: answer[name] for name in least}) } of {least}, {answer['errors']}"
                )
            await asyncio.sleep(STEP_S)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(10.0)


def _ask(process: subprocess.Popen[str], word: str) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    process.stdin.write(word + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a process of agents ended")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _say(text: str) -> None:
    print(f"scale: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Bench:
    """One run. `connect` makes the connection to a server that takes over, of its address, its token and what failed until then."""

    def __init__(
        self,
        chosen: argparse.Namespace,
        report: Report,
        work: Path,
        connect: Callable[[str, str, Counter[str]], Api] = Api,
    ) -> None:
        self.chosen = chosen
        self.connect = connect
        self.report = report
        self.work = work
        self.apps = [(f"p{number % PROJECTS}", f"a{number}") for number in range(chosen.apps)]

    def add(self, what: str, ours: float | None, unit: str, goal: str | None = None, why: str | None = None) -> None:
        _say(f"    {what}: {ours if ours is None else round(ours, 3)} {unit}")
        self.report.add(Result(what, ours, unit, goal=goal, why=why))

    async def run(self) -> None:
        with contextlib.ExitStack() as stack:
            etcd = await asyncio.to_thread(stack.enter_context, PrivateEtcd(1, data=self._etcd_data()))
            self.etcd, self.etcd_used = etcd, Watched(etcd.pid(0))
            self.first = Server(self.work, 1, etcd.url, None)
            self.second = Server(self.work, 2, etcd.url, self.first.key)
            stack.callback(self.first.kill)
            stack.callback(self.second.kill)
            await self.first.start()
            if self.chosen.spread:
                await self.second.start()
            self.api = Api(f"http://{self.first.address}", self.first.token)
            try:
                tokens = await self._tokens()
                servers = [self.first.address, self.second.address]
                words = [*(["quiet"] if self.chosen.no_beats else []), *([] if self.chosen.spread else ["together"])]
                self.drivers = Drivers(servers, tokens, self.chosen.drivers, words)
                stack.callback(self.drivers.close)
                await self._join()
                await self._deploy()
                await self._steady()
                if self.chosen.takeovers:
                    await self.take_overs()
            finally:
                await self.api.close()

    def _etcd_data(self) -> Path | None:
        if self.chosen.etcd_in_memory:
            return None
        data = self.work / "etcd"
        data.mkdir()
        return data

    async def _tokens(self) -> list[str]:
        """Make a token for each node, through the API as an operator's script would."""
        gate = asyncio.Semaphore(TOKENS_AT_ONCE)

        async def one(number: int) -> str:
            body = json.dumps({"name": f"n{number}", "role": "agent", "subject": f"n{number:05d}"}).encode()
            async with gate:
                answer = await self.api.call("make a token", "POST", "/v1/tokens", body)
            return str(answer["token"])

        began = time.perf_counter()
        found = await asyncio.gather(*(one(number) for number in range(self.chosen.nodes)))
        _say(f"{len(found)} tokens in {time.perf_counter() - began:.1f} s")
        return list(found)

    async def _join(self) -> None:
        began = time.perf_counter()
        nodes = self.chosen.nodes
        self._profile("join", nodes / 200)
        await self.drivers.until("nodes join", streams=nodes, tunnels=nodes)
        self.add(
            f"{nodes:,} nodes: from the first to all registered, with their streams and tunnels", time.perf_counter() - began, "s"
        )
        used = self.first.used.take()[0] + (self.second.used.take()[0] if self.chosen.spread else 0.0)
        await self.drivers.ask("regrant")  # of a cell that small nobody is asked to speak less often
        self.add("the same, of the servers' processor", used, "s")
        self.add("memory of the server with them, and nothing deployed", self.first.used.rss_mib(), "MiB RSS")
        self.etcd_used.take()

    async def _deploy(self) -> None:
        gate = asyncio.Semaphore(4)
        each = self.chosen.instances // len(self.apps)

        async def one(project: str, app: str) -> None:
            async with gate:
                await self.api.call("deploy an app, cold", "PUT", f"/v1/projects/{project}/apps/{app}", app_body(app, each))

        for number in range(PROJECTS):
            await self.api.call("make a project", "PUT", f"/v1/projects/p{number}", b"{}")
        self.total = each * len(self.apps)
        self._profile("deploy", self.total / 1_500)
        began = time.perf_counter()
        deploying = asyncio.gather(*(one(project, app) for project, app in self.apps))
        await self.drivers.until("deploy", instances=self.total)
        placed = time.perf_counter() - began
        await self.drivers.until("start", running=self.total)
        running = time.perf_counter() - began
        await deploying
        what = f"{self.total:,} instances of {len(self.apps):,} apps: from the first request"
        self.add(f"{what} to all placed and known to their agents", placed, "s")
        self.add(f"{what} to all running and reported", running, "s")
        self._latencies(("deploy an app, cold",))
        used, passed = self.first.used.take()
        self.add("server while they were deployed", used / passed * 100, "% of a core")
        if self.chosen.spread:
            self.add("the other server", self.second.used.take()[0] / passed * 100, "% of a core")
        self.add("the same, for each instance", used / self.total * 1e6, "us of processor")
        used, passed = self.etcd_used.take()
        self.add("etcd while they were deployed", used / passed * 100, "% of a core")
        said = await self.drivers.ask("take")
        self.add("report of an agent while they were deployed, p99", percentile(said["reports"], 99) * 1000, "ms")

    async def _steady(self) -> None:
        await asyncio.sleep(SETTLE_S)
        await self.drivers.ask(f"churn {self.total * CHANGES_PER_MIN / 60}")
        watches = [self.first.used, self.etcd_used, *self.drivers.used, *([self.second.used] if self.chosen.spread else [])]
        for watched in watches:
            watched.take()
        half = self.chosen.steady / 2
        self._profile("quiet", half)
        await asyncio.sleep(half)
        # First alone, so that what the cell itself costs is known; then with people.
        self._use("quiet steady state (heartbeats, beats, 1 % of statuses a minute)")
        await self.drivers.ask("take")
        self.api.took.clear()
        people = People(self.api, self.apps, self.chosen.nodes)
        using = asyncio.create_task(people.run())
        profile = self._profile("people", half)
        await asyncio.sleep(half)
        using.cancel()
        await asyncio.gather(using, return_exceptions=True)
        if profile is not None:
            profile.wait(60.0)
        self._use("steady state with people at the API")
        said = await self.drivers.ask("take")
        self.add("agents' reports, p99", percentile(said["reports"] or [0.0], 99) * 1000, "ms")
        self.add("agents' heartbeats over HTTP, p99", percentile(said["heartbeats"] or [0.0], 99) * 1000, "ms")
        self._latencies(tuple(sorted(self.api.took)))
        every = [value for values in self.api.took.values() for value in values]
        self.add(f"API, all {len(every):,} calls together, p99", percentile(every, 99), "s", "<= 1")
        if people.deploys:
            self.add("deploy of three instances to all ready, p50", percentile(people.deploys, 50), "s")
            self.add("the same, p99", percentile(people.deploys, 99), "s")
        self.add("memory of the server, most", self.first.used.rss_mib("VmHWM"), "MiB RSS")
        self.add("etcd's database", await asyncio.to_thread(_database_mib, self.etcd), "MiB")
        self.add("running, of all", said["running"], "instances")
        self.report.notes.append(f"failed calls: {dict(self.api.failed)}, of agents: {said['errors']}")

    def _profile(self, phase: str, seconds: float, server: Server | None = None) -> subprocess.Popen[bytes] | None:
        """Sample a server's stacks into a file, where that was asked for."""
        process = (server or self.first).process
        if not self.chosen.py_spy or process is None:
            return None
        command = [self.chosen.py_spy, "record", "-p", str(process.pid), "-d", str(max(1, int(seconds))), "--gil", "-f", "raw"]
        return subprocess.Popen(
            [*command, "-o", f"{self.chosen.profiles}/{phase}.txt"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _use(self, when: str) -> None:
        used, passed = self.first.used.take()
        self.add(f"server, {when}", used / passed * 100, "% of a core")
        self.add(f"of it in the kernel, {when}", self.first.used.kernel_s / passed * 100, "% of a core")
        self.add(f"server, {when}", self.first.used.rss_mib(), "MiB RSS")
        if self.chosen.spread:
            used, passed = self.second.used.take()
            self.add(f"the other server, {when}", used / passed * 100, "% of a core")
            self.add(f"the other server, {when}", self.second.used.rss_mib(), "MiB RSS")
        used, passed = self.etcd_used.take()
        self.add(f"etcd, {when}", used / passed * 100, "% of a core")
        self.add(f"etcd, {when}", self.etcd_used.rss_mib(), "MiB RSS")
        used = sum(watched.take()[0] for watched in self.drivers.used)
        self.add(f"the simulated agents (not ours), {when}", used / passed * 100, "% of a core")

    def _latencies(self, calls: tuple[str, ...]) -> None:
        for what in calls:
            took = self.api.took[what]
            if took:
                self.add(f"{what}, p50 of {len(took)}", percentile(took, 50) * 1000, "ms")
                self.add(f"{what}, p99", percentile(took, 99) * 1000, "ms")

    async def take_overs(self) -> None:
        """Kill the server that leads, again and again. The failed calls of all times are told, even where one has no end."""
        failed: Counter[str] = Counter()
        try:
            await self._take_overs(failed)
        finally:
            self.report.notes.append(f"failed calls at the take-overs, all together: {dict(failed)}")

    async def _take_overs(self, failed: Counter[str]) -> None:
        await self.drivers.ask("churn 0")  # so that all run at the end
        leading, waiting = self.first, self.second
        wrote: list[float] = []
        planned: list[float] = []
        back: list[float] = []
        used: list[float] = []
        before: dict[str, Any] = {}
        lost_before = await _lost(self.api)
        api = self.api
        for number in range(self.chosen.takeovers):
            if number or not self.chosen.spread:
                took_s = await waiting.start()
                await asyncio.sleep(READY_S)
                if number == self.chosen.spread:
                    self.add("a server that starts, to its first answer", took_s, "s")
                    self.add("memory of a server that has only loaded the state", waiting.used.rss_mib(), "MiB RSS")
                await self.drivers.ask("regrant")  # as each does within five minutes: now they beat to both
            await asyncio.sleep(SETTLE_S)
            before = before or await self.drivers.ask()
            if number:
                await api.close()
            api = self.connect(f"http://{waiting.address}", waiting.token, failed)
            waiting.used.take()
            self._profile(f"takeover{number}", 5.0 + self.chosen.nodes / 200, waiting)
            began = time.perf_counter()
            leading.kill()
            wrote.append(await self._first_write(api, f"after{number}", began))
            planned.append(await self._first_plan(api, f"after{number}", began))
            _say(f"    take-over {number + 1}: a write after {wrote[-1]:.3f} s, a plan after {planned[-1]:.3f} s")
            await self.drivers.until("agents come to the other server", streams=self.chosen.nodes, tunnels=self.chosen.nodes)
            back.append(time.perf_counter() - began)
            used.append(waiting.used.take()[0])
            leading, waiting = waiting, leading
        times = f"most of {len(planned)}"
        self.add(f"leading server killed → the other takes a write, {times}", max(wrote), "s")
        self.add(f"leading server killed → next plan committed, {times}", max(planned), "s", "<= 1.5")
        self.add(f"leading server killed → every agent has its streams again, {times}", max(back), "s")
        self.add("the same, of the other server's processor", max(used), "s")
        await self.drivers.until("all run", running=self.total)
        await asyncio.sleep(SETTLE_S)
        after = await self.drivers.ask()
        self.add("nodes believed lost by the new leaders", await _lost(api) - lost_before, "nodes", "<= 0")
        made = after["instances"] - before["instances"] - len(planned)
        self.add("instances made anew by them", made, "instances", "<= 0")
        self.add("memory of a server that has taken over", leading.used.rss_mib(), "MiB RSS")
        await api.close()

    async def _first_write(self, api: Api, app: str, began: float) -> float:
        """Deploy an app at a server while the one that leads is dying."""
        path, deadline = f"/v1/projects/p0/apps/{app}", began + PHASE_S
        while await api.call("deploy an app while the leader dies", "PUT", path, app_body(app, 1)) is None:
            if time.perf_counter() > deadline:
                raise TooSlow(f"no write is taken: {dict(api.failed)}")
        return time.perf_counter() - began

    async def _first_plan(self, api: Api, app: str, began: float) -> float:
        """Wait until its instance has a node."""
        async with asyncio.timeout(PHASE_S):
            while True:
                found = await api.call("read", "GET", f"/v1/projects/p0/instances?app={app}&limit=10")
                if found and any(item["instance"].get("node") for item in found["items"]):
                    return time.perf_counter() - began
                await asyncio.sleep(0.02)


async def _lost(api: Api) -> int:
    lost, after = 0, ""
    while True:
        page = await api.call("list", "GET", f"/v1/nodes?limit=1000{after and '&after=' + after}")
        lost += sum(item["health"] == "lost" for item in page["items"])
        if not page.get("next"):
            return lost
        after = page["next"]


def _database_mib(etcd: PrivateEtcd) -> float:
    status = json.loads(etcd.control("endpoint", "status", "--write-out=json").stdout)[0]["Status"]
    return float(status["dbSize"]) / (1 << 20)


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench scale")
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--instances", type=int, default=INSTANCES)
    parser.add_argument("--apps", type=int, default=0, help="without it, a hundred instances each")
    parser.add_argument("--steady", type=float, default=STEADY_S, help="seconds of steady state, half of them with people")
    parser.add_argument("--drivers", type=int, default=2, help="processes that hold the agents")
    parser.add_argument("--no-beats", action="store_true", help="heartbeats over HTTP only")
    parser.add_argument("--etcd-in-memory", action="store_true", help="its data not on a disk, where others keep that busy")
    precedence.offer(parser)
    parser.add_argument("--takeovers", type=int, default=TAKEOVERS, help="how often the server that leads is killed")
    parser.add_argument("--spread", action="store_true", help="two servers from the beginning, the agents spread over them")
    parser.add_argument("--py-spy", help="profile the server in steady state with this program")
    parser.add_argument("--profiles", default=".", help="where profiles and logs go")
    chosen = parser.parse_args(arguments)
    chosen.apps = chosen.apps or max(1, chosen.instances // 100)
    where = "in memory" if chosen.etcd_in_memory else "on disk"
    report = Report(
        "scale",
        notes=[f"{chosen.nodes} nodes, {chosen.instances} instances, {chosen.apps} apps; one etcd, its data {where}"],
    )
    if chosen.precedence:
        precedence.take()  # what it starts inherits it: etcd, the servers, the agents
        report.notes.append(precedence.told())
    if shutil.which("etcd") is None:
        report.add(Result("a large cell", None, "s", why="there is no etcd on this machine"))
        return report
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
    began = time.perf_counter()
    try:
        asyncio.run(Bench(chosen, report, work).run())
    except TooSlow as error:
        report.add(Result("a phase did not end", None, "s", why=str(error)))
    finally:
        if chosen.py_spy:
            for log in work.glob("*.log"):
                shutil.copy(log, chosen.profiles)
        shutil.rmtree(work, ignore_errors=True)
    report.notes.append(f"the whole run took {time.perf_counter() - began:.0f} s; load at its end {os.getloadavg()[0]:.1f}")
    return report
