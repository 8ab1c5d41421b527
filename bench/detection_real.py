"""Real sockets: one process is the server, others are agents, on the loopback; some of these are killed.

python -m bench.detection_real server SECONDS        prints its address, then one JSON line at the end
python -m bench.detection_real agents HOST:PORT FIRST COUNT
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from typing import Any

import structlog

from atoll.control.detection.decide import Standing
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.model import beats
from atoll.model.beats import BeatGrant
from atoll.model.ports.clock import SystemClock, system_random
from atoll.model.ports.datagrams import Udp
from atoll.node.contact import Contact
from atoll.node.pulse import Pulse

CELL_KEY = bytes(32)
SETTLE_S = 8.0
"""Until all beat at their usual rate."""
MEASURE_S = 10.0


async def server() -> None:
    """Serve until the agents of which some die have been believed silent; say what it took."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    clock = SystemClock()
    exchange = Exchange(
        key_of=lambda node, epoch: beats.key_of(CELL_KEY, node, epoch),
        site_of=lambda node: f"s{int(node[1:]) % 8}",
        last_seen={},
        clock=clock,
        chance=system_random(),
    )
    end = await Udp().open(("127.0.0.1", 0), exchange.receive)
    exchange.send_to = end.send
    exchange.lead(True)
    print(json.dumps({"port": end.address[1]}), flush=True)
    silent_at: dict[str, float] = {}
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    asked = asyncio.ensure_future(lines.readline())
    while True:
        exchange.tick()
        for name, watch in exchange.watches.items():
            if watch.standing is Standing.SILENT:
                silent_at.setdefault(name, time.monotonic())
        if asked.done():
            if not asked.result():
                return
            traffic = exchange.traffic
            said = {"silent_at": silent_at, "peers": len(exchange.peers), "processor_s": time.process_time(), **vars(traffic)}
            print(json.dumps(said), flush=True)
            asked = asyncio.ensure_future(lines.readline())
        await asyncio.sleep(TICK_S)


async def agents(port: int, first: int, count: int) -> None:
    """Beat as `count` nodes, each from a socket of its own, for ever."""
    clock = SystemClock()
    pulses = []
    for number in range(first, first + count):
        name = f"n{number}"
        pulse = Pulse(name, contact=Contact(boot_id=""), counter=int(clock.now() * 1000))

        def receive(data: bytes, sender: tuple[str, int], pulse: Pulse = pulse) -> None:
            pulse.receive(data, sender, clock.monotonic())

        end = await Udp().open(("127.0.0.1", 0), receive)
        pulse.send_to = end.send
        pulse.inside = f"127.0.0.1:{end.address[1]}"
        epoch = beats.epoch_at(clock.now())
        pulse.serve(BeatGrant(key=beats.key_of(CELL_KEY, name, epoch), epoch=epoch, lasts_s=3600.0), [("127.0.0.1", port)])
        pulses.append(pulse)
    while True:
        now = clock.monotonic()
        for pulse in pulses:
            pulse.tick(now)
        await asyncio.sleep(0.02)


def measure(count: int = 200, killed: int = 20) -> dict[str, float]:
    """Return what a real server with `count` agents needs a second, and how long after their death `killed` of them were
    believed silent; and how many others were."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bench.detection_real", *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    serving = start("server")
    running = [serving]
    try:
        assert serving.stdout is not None and serving.stdin is not None  # noqa: PT018

        def ask() -> dict[str, Any]:
            serving.stdin.write("\n")  # type: ignore[union-attr]
            serving.stdin.flush()  # type: ignore[union-attr]
            answer: dict[str, Any] = json.loads(serving.stdout.readline())  # type: ignore[union-attr]
            return answer

        port = json.loads(serving.stdout.readline())["port"]
        living = start("agents", str(port), "0", str(count - killed))
        dying = start("agents", str(port), str(count - killed), str(killed))
        running += [living, dying]
        time.sleep(SETTLE_S)
        before = ask()
        time.sleep(MEASURE_S)
        after = ask()
        dying.send_signal(signal.SIGKILL)
        died_at = time.monotonic()
        time.sleep(8.0)
        last = ask()
        silent = {name: at - died_at for name, at in last["silent_at"].items()}
        doomed = {f"n{number}" for number in range(count - killed, count)}
        found = sorted(silent[name] for name in doomed & silent.keys())
        return {
            "peers": after["peers"],
            "processor": (after["processor_s"] - before["processor_s"]) / MEASURE_S,
            "received": (after["received"] - before["received"]) / MEASURE_S,
            "sent": (after["sent"] - before["sent"]) / MEASURE_S,
            "bytes": (after["received_bytes"] + after["sent_bytes"] - before["received_bytes"] - before["sent_bytes"]) / MEASURE_S,
            "found": len(found),
            "slowest_s": found[-1] if found else float("nan"),
            "wrong": len(silent.keys() - doomed),
        }
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(server())
    else:
        asyncio.run(agents(*(int(argument) for argument in sys.argv[2:5])))
