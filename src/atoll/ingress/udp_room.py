"""Which UDP ports are open at an ingress: as many as it has room for all clients of together. Pure.

A client is whoever sends a datagram, by an address that can be made up, and it costs Envoy a socket; so the room for the clients of
a port is set aside when it is opened, and no app takes that of another.
"""

from __future__ import annotations

from msgspec import Struct


class _Asked(Struct, frozen=True):
    cluster: str
    clients: int


class UdpRoom:
    """Ports that lead to one cluster share the room of that. Who came first has it, and who asks for more comes last."""

    def __init__(self, clients_max: int) -> None:
        self.clients_max = clients_max
        self._asked: dict[str, _Asked] = {}
        """In the order in which they came."""
        self._open: set[str] = set()
        self._touched: set[str] = set()
        self._new: set[str] = set()
        """Those that ask for what they did not have."""

    def ask(self, port: str, cluster: str, clients: int) -> None:
        """Have room for a port whose clients are `clients` at most. Safe to repeat."""
        before, now = self._asked.get(port), _Asked(cluster, clients)
        if before is None or before.cluster != cluster or before.clients < clients:
            self._asked.pop(port, None)
            self._new.add(port)
        self._asked[port] = now
        self._touched.add(port)

    def leave(self, port: str) -> None:
        """Give its room back. Safe to repeat."""
        if self._asked.pop(port, None) is not None:
            self._touched.add(port)

    def settle(self) -> set[str]:
        """Give the room out, and return the ports of which something is, or may be, another thing now."""
        if not self._touched:
            return set()
        before, self._open = self._open, set()
        held: dict[str, int] = {}
        # Who has room and asks for no more keeps it, whoever of those that share it goes.
        for port, asked in sorted(self._asked.items(), key=lambda each: each[0] not in before or each[0] in self._new):
            more = max(0, asked.clients - held.get(asked.cluster, 0))
            if sum(held.values()) + more <= self.clients_max:
                held[asked.cluster] = held.get(asked.cluster, 0) + more
                self._open.add(port)
        touched, self._touched = self._touched | (before ^ self._open), set()
        self._new.clear()
        return touched

    def is_open(self, port: str) -> bool:
        return port in self._open

    def why_not(self, port: str) -> str | None:
        """Return why a port that was asked for is not open; None where it is, or was not asked for."""
        asked = self._asked.get(port)
        if asked is None or port in self._open:
            return None
        return (
            f"{port}: this ingress has room for {self.clients_max} clients of UDP ports, and too little of it is left for"
            f" {asked.clients} of this one; have the app want fewer (ingress.limits.connections)"
        )
