"""A small web app. It serves on $PORT, and on SIGTERM it finishes what it is answering, then ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PORT = int(os.environ.get("PORT", "8000"))
INSTANCE = os.environ.get("ATOLL_INSTANCE") or os.environ.get("HOSTNAME") or os.uname().nodename
GREETING = os.environ.get("GREETING", "Hello from Atoll")
SLOW_MS_MAX = 60_000
DRAIN_S = 8.0

active = 0
changed = threading.Condition()
stopping = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        super().handle_one_request()
        if stopping.is_set():
            self.close_connection = True

    def do_GET(self) -> None:
        global active
        with changed:
            active += 1
        try:
            self.route()
        finally:
            with changed:
                active -= 1
                changed.notify_all()

    do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

    def route(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            self.answer(200, f"{GREETING}! I am {INSTANCE}.\n")
        elif url.path == "/healthz":
            self.answer(200, "ok\n")
        elif url.path == "/slow":
            try:
                wait_ms = min(max(int(parse_qs(url.query).get("ms", ["1000"])[0]), 0), SLOW_MS_MAX)
            except ValueError:
                self.answer(400, "ms must be a whole number\n")
                return
            time.sleep(wait_ms / 1000)
            self.answer(200, f"{INSTANCE} waited {wait_ms} ms.\n")
        elif url.path == "/env":
            names = sorted(name for name in os.environ if name.startswith("ATOLL_"))
            self.answer(200, json.dumps({name: os.environ[name] for name in names}) + "\n", "application/json")
        else:
            self.answer(404, "There is nothing here.\n")

    def answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Instance", INSTANCE)
        if stopping.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(f"{self.client_address[0]} {format % args}", flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    block_on_close = False


def main() -> None:
    server = Server(("", PORT), Handler)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stopping.set())
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
    print(f"{INSTANCE} listens on port {PORT}", flush=True)
    while not stopping.wait(3600):
        pass
    print(f"{INSTANCE} stops", flush=True)
    server.shutdown()
    server.server_close()
    with changed:
        changed.wait_for(lambda: active == 0, timeout=DRAIN_S)


if __name__ == "__main__":
    main()
