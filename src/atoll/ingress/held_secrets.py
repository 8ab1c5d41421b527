"""Which secrets one Envoy holds, and which it is to let go of. No I/O."""

from __future__ import annotations

from collections.abc import Collection

from atoll.ingress.resources import HTTP3_SECRET, SHOWN, said
from atoll.model.certificates import covers

SECRETS_MAX = 16_384
"""Certificates that Envoy keeps in memory, some 20 KiB each. Of a wildcard it has one for each name that a client makes up, so that
without a bound strangers could fill it; one that was let go of is asked for again when it is needed, which takes 3 ms."""


class HeldSecrets:
    """Those of names that clients say, those of the HTTP/3 listener's `http3_hosts` (live), and what instances are shown."""

    def __init__(self, http3_hosts: Collection[str] = ()) -> None:
        self._http3_hosts = http3_hosts
        self._kept: dict[str, None] = {}
        """Secrets that Envoy holds, in the order in which it asked for them. It never says when it has no use for one any more."""
        self._odd: set[str] = set()
        """Of them, and of what the listener asked for, those that are not written as a hostname is: in capitals."""
        self._listened: set[str] = set()
        """Secrets that the HTTP/3 listener asked for: as many as it has hostnames, and Envoy says when it has no use for one."""
        self._withdrawn: set[str] = set()
        """Secrets that it is about to be told to let go of."""

    def ask(self, name: str) -> bool:
        """Note that Envoy asks for this secret, and keeps it from now on; return whether it waits to hear that there is none."""
        if name == SHOWN:
            return False  # a cluster's: there is one of it, and Envoy says when it has no use for it
        self._withdrawn.discard(name)
        self._let_go(name)
        if name != name.lower():
            self._odd.add(name)
        if name not in self._listened:
            self._kept[name] = None
        return True

    def leave(self, name: str) -> None:
        """Note that Envoy has no use for it any more."""
        self._listened.discard(name)
        self._let_go(name)

    def touched(self, host: str) -> set[str]:
        """Return what Envoy holds under other names that a change of this host's certificate is one of."""
        several = {*self._kept, *self._odd} if host.startswith("*.") else self._odd
        return {kept for kept in several if covers(host, said(kept))}

    def bound(self, dirty: Collection[str]) -> list[str]:
        """Set apart what the HTTP/3 listener asked for; of too many others have Envoy let go of those that it has had longest.

        A client may say such a name, too: only of a hostname that the listener has is it taken for the listener's. This waits
        until something is about to be said of secrets, `dirty`, as it is known then what the listener has, after a restart as well.
        Returns what is to be let go of.
        """
        for name in dirty:
            if name in self._kept and name.startswith(HTTP3_SECRET) and name.removeprefix(HTTP3_SECRET) in self._http3_hosts:
                del self._kept[name]
                self._listened.add(name)
        dropped = []
        while len(self._kept) > SECRETS_MAX:
            oldest = next(iter(self._kept))
            self._let_go(oldest)
            self._withdrawn.add(oldest)
            dropped.append(oldest)
        return dropped

    def withholds(self, name: str) -> bool:
        """Whether Envoy is told that there is none, whatever there is."""
        return name in self._withdrawn or (name.startswith(HTTP3_SECRET) and name not in self._listened)

    def withdraw(self, name: str) -> bool:
        """Note that Envoy is told that there is none; return whether it asks again when a client says the name."""
        if name in self._listened:
            return False
        self._withdrawn.discard(name)
        self._let_go(name)
        return True

    def _let_go(self, name: str) -> None:
        self._kept.pop(name, None)
        self._odd.discard(name)
