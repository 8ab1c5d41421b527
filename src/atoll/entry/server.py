"""`atoll server`: store, API, and when it leads the controllers and the scheduler."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

import structlog

from atoll.api.http.app import create_app
from atoll.api.http.serve import listen, serving
from atoll.api.registry.handlers import registry_handler
from atoll.api.registry.registry import Registry
from atoll.api.service import SYSTEM, Service
from atoll.api.service.context import KINDS
from atoll.control.controllers import run_control
from atoll.entry.config import Config, split_address, write_private
from atoll.entry.process import Stop, run, run_until, together
from atoll.model.errors import Unauthenticated
from atoll.model.ports.clock import SystemClock, system_random
from atoll.model.records import Role
from atoll.model.views import TokenRequest
from atoll.sdk.context import Saved, save
from atoll.store.cache import State
from atoll.store.place import open_place

log = structlog.get_logger()


async def main(config: Config, stop: Stop) -> None:
    """Serve until `stop`. Raises Unavailable (the port is taken, etcd does not answer), Conflict (the data is in use), Corrupt."""
    listener = listen(*split_address(config.api, field="--api"))
    clock, random = SystemClock(), system_random()
    config.server_data.mkdir(parents=True, exist_ok=True, mode=0o700)
    place = config.store_place
    kind = "sqlite" if isinstance(place, Path) else "etcd"
    store = await open_place(place, clock)
    try:
        async with State(store, KINDS) as state:
            key = cell_key(config.server_data / "key")
            service = Service(store, state, clock, random, key, config.domain, store_name=kind)
            await service.start()
            await write_tokens(config, service)
            registry = Registry(config.server_data / "registry", service)
            app = create_app(service, mounts=[registry_handler(registry, service)])
            async with serving(app, service, listener):
                log.info("serving", api=f"http://{config.api}", store=kind)
                heartbeats = service.heartbeats
                control = run_control(
                    store,
                    state,
                    clock,
                    random,
                    heartbeats.last_seen(),
                    heartbeats=heartbeats.all(),
                    identity=config.node_name,
                )
                await run_until(stop, together(control, registry.run()))
    finally:
        await store.close()


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
