"""`atoll server`: store, API, and when it leads the controllers and the scheduler."""

from __future__ import annotations

import contextlib
import gc
import secrets
import sys
from pathlib import Path

import structlog

from atoll.api.http.app import create_app
from atoll.api.http.serve import listen, serving
from atoll.api.registry.handlers import registry_handler
from atoll.api.registry.registry import Registry
from atoll.api.service import SYSTEM, Service
from atoll.api.service.context import KINDS
from atoll.api.service.data_version import check_data
from atoll.api.service.sealing import KEY_BYTES
from atoll.api.service.servers import check_key
from atoll.control.controllers import run_control
from atoll.control.detection.listening import listen_for_beats
from atoll.control.heir import Heir
from atoll.control.keeping import ThreadKeeper
from atoll.control.leader import Keep
from atoll.control.optimiser import ProcessOptimiser
from atoll.control.queries import Ask
from atoll.control.world import KINDS as CONTROL_KINDS
from atoll.entry.certificates import signers_of
from atoll.entry.config import Config, is_loopback, split_address
from atoll.entry.deaths import Deaths
from atoll.entry.exchange import exchange_of
from atoll.entry.process import Stop, run, run_until, together
from atoll.entry.serving import ServerCertificate, certificate_life_s, peer_dial, server_id, server_record
from atoll.model import keys
from atoll.model.errors import Corrupt, Invalid, Unauthenticated
from atoll.model.ports.clock import Clock, SystemClock, system_random
from atoll.model.ports.datagrams import Udp
from atoll.model.ports.store import Store
from atoll.model.records import Role
from atoll.model.views import TokenRequest
from atoll.sdk.context import Saved, save
from atoll.sdk.private_file import make_private, write_private
from atoll.store.cache import State
from atoll.store.place import Place, open_place

GC_ALLOCATIONS = 20_000
"""Objects made beyond those that went, after which the youngest are looked at; Python's own default is 700."""
GC_YOUNG, GC_MIDDLE = 20, 50
"""Looks at the youngest, and at those after them, before a look at the next older ones; by default 10 each."""
SWITCH_S = 0.0005
"""How long one thread computes while another waits for its turn. The event loop waits so long for each piece of I/O while a dry run
is made beside it; with Python's own 5 ms it would get through 200 of them in a second."""

log = structlog.get_logger()


async def main(config: Config, stop: Stop) -> None:
    """Serve until `stop`.

    Raises Unavailable (the port is taken, the disk is full, etcd does not answer), Conflict (the data or the server's id is in
    use), Corrupt (the data, or the key is not the cell's), Unsupported (the data is of another version), Invalid.
    """
    secure, life_s = config.secure, certificate_life_s(config)
    listener = listen(*split_address(config.listens, field="--listen"))
    if not secure and not is_loopback(split_address(config.listens, field="--listen")[0]):
        log.warning("others than this machine may come, and nothing is encrypted", listen=config.listens)
    clock, random = SystemClock(), system_random()
    make_private(config.server_data)
    place = config.store_place
    kind = "sqlite" if isinstance(place, Path) else "etcd"
    store = await open_place(place, clock)
    try:
        await check_data(store)
        async with State(store, {**KINDS, **CONTROL_KINDS}) as state:
            key = await cell_key(config, store)
            id = server_id(config)
            service = Service(
                store,
                state,
                clock,
                random,
                key,
                config.domain,
                store_name=kind,
                server=server_record(config, id),
                dial=peer_dial(config.ca_file),
                certificate_life_s=life_s,
            )
            await check_key(service.context)
            await service.start()
            certificate = ServerCertificate(config, service, id, clock)
            if secure:
                await certificate.begin()
            await write_tokens(config, service)
            registry = Registry(config.server_data / "registry", service)
            app = create_app(service, mounts=[registry_handler(registry, service)])
            settle_memory()
            sys.setswitchinterval(SWITCH_S)
            async with serving(app, service, listener, tls=certificate.tls if secure else None) as api:
                log.info("serving", api=config.url, store=kind, server=id)
                heartbeats = service.heartbeats
                detection = exchange_of(service, state, clock)
                heir = Heir(state, clock)
                service.planning.live = heir.copy
                beats = listen_for_beats(detection, Udp(), split_address(config.listens, field="--listen"))
                deaths = Deaths(state)

                async def ended(leader: str) -> None:
                    await deaths.of(leader)
                    api.turns.hold()

                control = run_control(
                    store,
                    state,
                    clock,
                    random,
                    heartbeats.last_seen(),
                    heartbeats=heartbeats.all(),
                    traffic=service.traffic.totals(),
                    ingresses=service.ingresses.all(),
                    demand=service.demand,
                    ask=_ask(config.prometheus),
                    optimiser=ProcessOptimiser(config.server_data / "kernels"),
                    identity=id,
                    detection=detection,
                    ended=ended,
                    certificates=signers_of(service),
                    keep=lease_keeper(place, clock),
                    heir=heir,
                )
                work = [control, beats, registry.run(), service.servers.run(), *([certificate.run()] if secure else [])]
                await run_until(stop, together(*work))
    finally:
        await store.close()


def lease_keeper(place: Place, clock: Clock) -> Keep | None:
    """Return what keeps the leader's lease while the event loop is busy; None for SQLite, which nobody else can lead over."""
    if isinstance(place, Path):
        return None
    from atoll.store.etcd.keeping import EtcdLeaseKeeper  # who keeps to SQLite does not pay for gRPC

    return ThreadKeeper(lambda: EtcdLeaseKeeper(place), clock).keep


def _ask(servers: str) -> Ask | None:
    """Return how Prometheus servers are asked, where the operator has named any. Raises Invalid."""
    if not servers:
        return None
    from atoll.entry.prometheus import PrometheusClient, servers_of  # a client that most servers have no use for

    return PrometheusClient(servers_of(servers))


def settle_memory() -> None:
    """Take what is loaded by now out of what Python's collector walks through, and have it walk less often.

    With thousands of agents it would stop everything for a good part of a second, again and again, and find next to nothing:
    records are never part of a circle, and what a connection leaves behind is little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, GC_YOUNG, GC_MIDDLE)


async def cell_key(config: Config, store: Store) -> bytes:
    """Return the key that seals secrets; a cell's first server makes it, any other is given it. Raises Corrupt, Invalid."""
    path = config.key_file
    if not path.exists():
        if config.key is not None:
            raise Invalid(f"--key: there is no {path}", field="key", mend="copy 'server/key' of another server there")
        if await store.get(keys.CELL_KEY) is not None:
            raise Corrupt(
                f"this server has no key ({path}), and the cell has one already",
                mend="copy 'server/key' of another server or of the backup here, or name it with --key FILE; "
                "where it is lost for good: atoll store forget-key",
            )
        write_private(path, secrets.token_bytes(KEY_BYTES))
    return path.read_bytes()


async def write_tokens(config: Config, service: Service) -> None:
    """See that this machine's CLI, agent and ingress each have a token in a file of mode 0600 that the store knows."""
    node = config.node_name
    admin = await _token_in(config.server_data / "admin-token", service, TokenRequest(name="admin", role=Role.ADMIN))
    await _token_in(config.agent_data / "token", service, TokenRequest(name="agent", role=Role.AGENT, subject=node))
    await _token_in(config.ingress_data / "token", service, TokenRequest(name="ingress", role=Role.INGRESS, subject=node))
    ca = config.ca_file.read_text() if config.secure else None
    save(config.client_file, Saved(address=config.url, token=admin, ca=ca))


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
