"""What the ingress is measured beside and with: proxies with one route written by hand, an instance that answers at once, wrk."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from atoll.ingress.envoy import find_binary

UP_S = 20.0
TIMEOUT_S = 10
"""Of a request; one that takes longer has failed. On a busy machine wrk itself may not get its turn for its own two seconds."""
PROXY_CORE, OTHER_CORE = 0, 1


@dataclass
class Peer:
    """A proxy that runs; `stop` ends it."""

    LEAN: ClassVar[str] = "lean Envoy"
    name: str
    port: int
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Backend:
    """The instance behind every proxy: a small program in C, so that it is never what limits."""

    def __init__(self, directory: Path) -> None:
        self.program = compile_answer(directory)
        self.port = 0

    def __enter__(self) -> Backend:
        self._process = subprocess.Popen([str(self.program), "0"], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        pin(self._process.pid, OTHER_CORE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


def compile_answer(directory: Path) -> Path:
    program = directory / "answer"
    source = Path(__file__).with_name("answer.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", str(program), str(source)], check=True)
    return program


def pin(pid: int, core: int) -> None:
    """Keep every thread of a process to one core, where there are several."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {cores[core]})


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def envoy_lean(directory: Path, backend: int) -> Peer:
    """As few lines as a proxy with one route can be written in: no log, no limits, no retries."""
    port = _free()
    google = "type.googleapis.com/envoy.extensions.filters"
    route = {"match": {"prefix": "/"}, "route": {"cluster": "backend"}}
    manager = {
        "@type": f"{google}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "lean",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": f"{google}.http.router.v3.Router"}}],
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    at = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": backend}}}}
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
                    "filter_chains": [{"filters": filters}],
                }
            ],
            "clusters": [
                {
                    "name": "backend",
                    "type": "STATIC",
                    "load_assignment": {"cluster_name": "backend", "endpoints": [{"lb_endpoints": [at]}]},
                }
            ],
        }
    }
    path = directory / "lean.json"
    path.write_text(json.dumps(config))
    command = [str(find_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return _up(Peer.LEAN, port, command)


def haproxy(directory: Path, backend: int) -> Peer | None:
    program = shutil.which("haproxy")
    if program is None:
        return None
    port = _free()
    path = directory / "haproxy.cfg"
    path.write_text(
        "global\n  nbthread 1\n  maxconn 4096\n"
        "defaults\n  mode http\n  timeout connect 2s\n  timeout client 60s\n  timeout server 60s\n"
        f"frontend f\n  bind 127.0.0.1:{port}\n  default_backend b\n"
        f"backend b\n  http-reuse always\n  server s 127.0.0.1:{backend}\n"
    )
    return _up("HAProxy", port, [program, "-db", "-f", str(path)])


def nginx(directory: Path, backend: int) -> Peer | None:
    program = shutil.which("nginx")
    if program is None:
        return None
    port = _free()
    path = directory / "nginx.conf"
    path.write_text(
        f"daemon off; master_process off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.err;\n"
        "events { worker_connections 4096; }\n"
        "http { access_log off; keepalive_requests 100000000;\n"
        f"  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;\n"
        f"  upstream b {{ server 127.0.0.1:{backend}; keepalive 128; keepalive_requests 100000000; }}\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://b; proxy_http_version 1.1;\n"
        '    proxy_set_header Connection ""; proxy_set_header Host $host; } } }\n'
    )
    return _up("nginx", port, [program, "-c", str(path), "-e", f"{directory}/nginx.err"])


def _up(name: str, port: int, command: list[str]) -> Peer:
    # In a session of its own, as ours is: the kernel shares a busy machine out among sessions.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + UP_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{name} does not come up")
        time.sleep(0.02)
    pin(process.pid, PROXY_CORE)
    return Peer(name, port, process)


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Load:
    per_s: float
    requests: int
    failed: int
    """Answers other than 2xx and 3xx, and connections that broke or timed out."""


def wrk(port: int, host: str, connections: int, seconds: float) -> Load:
    """Run wrk with one thread on the core that no proxy has. Raises RuntimeError."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[OTHER_CORE] if len(cores) > 1 else cores[0]
    command = ["taskset", "-c", str(core), *wrk_command(port, host, connections, seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"wrk: {done.stdout}{done.stderr}")
    return counted(done.stdout)


def wrk_command(port: int, host: str, connections: int, seconds: float) -> list[str]:
    load = ["-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT_S}s"]
    return ["wrk", *load, "-H", f"Host: {host}", f"http://127.0.0.1:{port}/"]


def counted(text: str) -> Load:
    """Return what wrk printed."""
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    total = re.search(r"(\d+) requests in", text)
    if rate is None or total is None:
        raise RuntimeError(f"wrk: {text}")
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = (int(other[1]) if other else 0) + (sum(map(int, broken.groups())) if broken else 0)
    return Load(float(rate[1]), int(total[1]), failed)
