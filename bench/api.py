"""The API under load on one machine with SQLite: reads/s, durable writes/s, and what it takes when idle."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from atoll.entry.scratch import ScratchAtoll
from bench.report import Report, Result, median

ROUNDS = 5
ROUND_S = 4
CONNECTIONS = 32
IDLE_S = 20.0
CLOCK_TICKS = 100
"""Of /proc/PID/stat, per second."""

WRITE_SCRIPT = """
local count = 0
local thread_id = 0
function setup(thread) thread:set("id", thread_id) thread_id = thread_id + 1 end
request = function()
  count = count + 1
  local name = string.format("s%d-%d", id, count % 500)
  return wrk.format("PUT", "/v1/projects/default/secrets/" .. name,
    {["Authorization"] = "Bearer TOKEN", ["Content-Type"] = "application/json"}, string.format('{"value": "%d"}', count))
end
"""


def run(arguments: list[str]) -> Report:
    """Measure and return the report."""
    parser = argparse.ArgumentParser(prog="python -m bench api")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args(arguments).rounds
    report = Report(
        "api", notes=[f"medians of {rounds} rounds of {ROUND_S} s, {CONNECTIONS} connections, the load on the same two cores"]
    )
    if shutil.which("wrk") is None:
        report.add(Result("API under load", None, "1/s", why="wrk is not installed"))
        return report
    work = Path(tempfile.mkdtemp(prefix="atoll-bench-"))
    try:
        with ScratchAtoll("atoll-bench-") as scratch:
            _idle(scratch, report)
            _load(scratch, report, work, rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _load(scratch: ScratchAtoll, report: Report, work: Path, rounds: int) -> None:
    scratch.atoll("secrets", "set", "read-me", stdin="value")
    script = work / "write.lua"
    script.write_text(WRITE_SCRIPT.replace("TOKEN", scratch.token))
    script.chmod(0o600)
    reads, reads_p99, writes, writes_p99 = [], [], [], []
    for _ in range(rounds):
        rate, p99 = _wrk(scratch, "/v1/projects/default/secrets?limit=10", None)
        reads.append(rate)
        reads_p99.append(p99)
        rate, p99 = _wrk(scratch, "/", script)
        writes.append(rate)
        writes_p99.append(p99)
    report.add(Result("reads (a list of one record, authenticated)", median(reads), "1/s", goal=">= 2000"))
    report.add(Result("read latency p99", median(reads_p99), "ms"))
    report.add(Result("durable writes (each its own transaction, fsync before the answer)", median(writes), "1/s", goal=">= 500"))
    report.add(Result("write latency p99", median(writes_p99), "ms"))


def _wrk(scratch: ScratchAtoll, path: str, script: Path | None) -> tuple[float, float]:
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{ROUND_S}s", "--latency", f"http://{scratch.api}{path}"]
    if script:
        command += ["-s", str(script)]
    else:
        command += ["-H", f"Authorization: Bearer {scratch.token}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ROUND_S + 30).stdout
    if failed := re.search(r"Non-2xx or 3xx responses: (\d+)", text):
        raise RuntimeError(f"{failed[1]} requests failed\n{text}")
    rate, p99 = re.search(r"Requests/sec:\s+([\d.]+)", text), re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    if rate is None or p99 is None:
        raise RuntimeError(f"wrk said\n{text}")
    return float(rate[1]), float(p99[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[p99[2]]


def _idle(scratch: ScratchAtoll, report: Report) -> None:
    """Memory and processor use of every Atoll process, Envoy apart, with nothing deployed."""
    time.sleep(5)
    processes = _processes(scratch)
    before = {pid: _ticks(pid) for pid in processes}
    time.sleep(IDLE_S)
    after = {pid: _ticks(pid) for pid in processes}
    share = sum(after[pid] - before[pid] for pid in processes) / CLOCK_TICKS / IDLE_S * 100
    memory = {what: _rss_mib(pid) for pid, what in processes.items()}
    core = sum(value for what, value in memory.items() if what in ("server", "agent"))
    report.add(Result("idle memory, server + agent", core, "MiB RSS", goal="< 200"))
    report.add(Result("idle memory, every process of ours (supervisor and ingress too)", sum(memory.values()), "MiB RSS"))
    report.add(Result("idle processor use, every process of ours", share, "% of a core", goal="< 2"))
    report.notes.append("idle MiB RSS: " + ", ".join(f"{what} {value:.0f}" for what, value in sorted(memory.items())))


def _processes(scratch: ScratchAtoll) -> dict[int, str]:
    """Return pid → what it is, for this scratch Atoll's Python processes."""
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(scratch.data) not in " ".join(command) or "python" not in command[0]:
            continue
        role = next((part.rsplit(".", 1)[1] for part in command if part.startswith("atoll.entry.")), "supervisor")
        found[int(folder.name)] = role
    return found


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def _rss_mib(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0
