"""`atoll server`: store, API, and when it leads the controllers and the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from atoll.api.http.app import create_app
from atoll.api.service.access import Caller
from atoll.api.service.context import KINDS
from atoll.api.service.service import Service
from atoll.control.controllers import run_control
from atoll.entry.config import Config, split_address, write_private
from atoll.entry.process import run
from atoll.model.errors import Conflict, Unauthenticated
from atoll.model.ports.clock import SystemClock, system_random
from atoll.model.records import Role
from atoll.model.views import TokenRequest
from atoll.sdk.context import Saved, save
from atoll.store.cache import State
from atoll.store.sqlite import SqliteStore

SHUTDOWN_S = 3
"""How long requests under way may take when the server ends."""
SYSTEM = Caller(id="system", role=Role.ADMIN, project="*", subject="", name="system")
log = structlog.get_logger()


class _Server(uvicorn.Server):
    """uvicorn, told to stop by us: one place in the process listens for signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def main(config: Config, stop: asyncio.Event) -> None:
    """Serve until `stop`. Raises Conflict (port or data in use), Corrupt, Unavailable."""
    listener = listen(config.api)
    clock, random = SystemClock(), system_random()
    key = cell_key(config.server_data / "key")
    store = await SqliteStore.open(config.server_data / "state.db", clock)
    try:
        async with State(store, KINDS) as state:
            service = Service(store, state, clock, random, key, config.domain, store_name="sqlite")
            async with service:
                await write_tokens(config, service)
                app = create_app(service, config.server_data / "registry")
                server = _Server(_settings(app))
                control = asyncio.create_task(
                    run_control(
                        store=store,
                        state=state,
                        clock=clock,
                        random=random,
                        last_seen=service.heartbeats,
                        identity=config.node_name,
                    )
                )
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                stopping = asyncio.create_task(stop.wait())
                log.info("serving", api=f"http://{config.api}", store="sqlite")
                await asyncio.wait({control, serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                server.should_exit = True
                service.watching.close()
                stopping.cancel()
                control.cancel()
                await asyncio.gather(serving, return_exceptions=False)
                with contextlib.suppress(asyncio.CancelledError):
                    await control
    finally:
        await store.close()


def _settings(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application, which uvicorn types more narrowly
        loop="none",
        http="httptools",
        ws="websockets-sansio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=75,
        backlog=1024,
    )


def listen(address: str) -> socket.socket:
    """Return a listening socket. Raises Conflict with the mend when the address is taken."""
    host, port = split_address(address, field="--api")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Conflict(f"--api: cannot listen on {address}: {error.strerror}", mend="give another address with --api") from None
    listener.setblocking(False)
    return listener


def cell_key(path: Path) -> bytes:
    """Return the key that seals secrets, made the first time."""
    if not path.exists():
        write_private(path, secrets.token_bytes(32))
    return path.read_bytes()


async def write_tokens(config: Config, service: Service) -> None:
    """See that this machine's CLI, agent and ingress each have a token in a file of mode 0600 that the store knows."""
    node = config.node_name
    admin = await _token_in(config.server_data / "admin-token", service, TokenRequest(name="admin", role=Role.ADMIN))
    await _token_in(config.agent_data / "token", service, TokenRequest(name="agent", role=Role.AGENT, subject=node))
    await _token_in(config.ingress_data / "token", service, TokenRequest(name="ingress", role=Role.INGRESS, subject=node))
    save(config.client_file, Saved(address=f"http://{config.api}", token=admin))


async def _token_in(path: Path, service: Service, wanted: TokenRequest) -> str:
    if path.exists():
        token = path.read_text().strip()
        with contextlib.suppress(Unauthenticated):
            caller = service.tokens.authenticate(token)
            if (caller.role, caller.subject) == (wanted.role, wanted.subject):
                return token
    made = await service.tokens.create(SYSTEM, wanted)
    if made.token is None:
        raise Unauthenticated("a new token came without its secret")
    write_private(path, made.token.encode())
    return made.token


if __name__ == "__main__":
    run("server", main)
