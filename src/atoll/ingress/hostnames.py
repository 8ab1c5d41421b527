"""Which hostnames Envoy is told ahead, and which when the first request for them comes. Pure.

Envoy makes all of its virtual hosts anew whenever one changes, which costs it some 9 µs for each. So of very many it has those only
that it was asked for, and a change of any other costs nothing. Up to `AHEAD_MAX` it has all of them, and beside them one that
answers for every other name: then no request waits, and nothing is asked. So it is, too, once strangers have made up more than
`ASKED_MAX` names: Envoy never forgets a name that it has asked for.

Nor does it ask for one a second time: a name that it was told to have nobody, or that was taken from it, is 404 until it is told of
it. So whatever was asked for is told ahead from then on, and nothing is taken away but what is gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from atoll.ingress.resources import ANY, NOBODY, ROUTE_CONFIG, Resource
from atoll.model.certificates import wildcards_over

AHEAD_MAX = 2_048
"""Hostnames that Envoy has all of. Of more it is told as it asks."""
ASKED_MAX = 65_536
"""Names that one Envoy may ask for, some 300 bytes of its memory each."""
MISS_PAUSE_S = 0.1
"""Between two answers that say of names only that nobody has them: with each Envoy makes all its virtual hosts anew."""
MISSED_MAX = 2_000
"""Of them in one answer."""

_PREFIX = f"{ROUTE_CONFIG}/"
_WILDCARD = f"{_PREFIX}*."


class Hostnames:
    """`hosts` is live: names as Envoy has them (`http/HOST`). Call `changed` after it was changed."""

    def __init__(self, hosts: Mapping[str, Resource], *, ahead_max: int = AHEAD_MAX, asked_max: int = ASKED_MAX) -> None:
        self._hosts = hosts
        self._ahead_max, self._asked_max = ahead_max, asked_max
        self._told: set[str] = set()
        """What Envoy is told of: what it had when there became too many, and all that it asked for, be it there or not."""
        self._asked: set[str] = set()
        self.all = True
        """Whether Envoy is told of all."""

    def shows(self, name: str) -> bool:
        """Whether Envoy is to have this virtual host."""
        if self.all or name == ANY:
            return self.all
        host = self._hosts.get(name)
        return name in self._told or name == NOBODY or (host is not None and (host.ahead or self._hides(name)))

    def begin(self, has: Iterable[str], asked: Iterable[str]) -> None:
        """Note that an Envoy has come that has these virtual hosts, and has asked for those."""
        self._asked = set(asked)
        self._told.update(has, map(_name, self._asked))
        self.all = self._tells_all()

    def changed(self, names: Iterable[str]) -> set[str]:
        """Take over a change of these; return all names of which Envoy has to be told something now, but for a change of `all`."""
        touched = set(names)
        before = self.all
        self.all = self._tells_all()
        if before and not self.all:
            self._told |= self._hosts.keys() - touched
        # What lies below a wildcard would be led by it if Envoy did not have it.
        below = tuple(name.removeprefix(f"{_PREFIX}*") for name in touched if name.startswith(_WILDCARD))
        return touched | {name for name in self._hosts if below and name.endswith(below)}

    def ask(self, alias: str) -> str | None:
        """Note that Envoy asks for `alias` (`http/HOST[:PORT]`); return the virtual host that answers it, if there is one."""
        name = _name(alias)
        self._asked.add(alias)
        self._told.add(name)
        self.all = self._tells_all()
        if name in self._hosts and name != ANY:
            return name
        over = (_PREFIX + each for each in wildcards_over(name.removeprefix(_PREFIX)))
        return next((each for each in over if each in self._hosts), ANY if self.all else None)

    def _tells_all(self) -> bool:
        return len(self._hosts) <= self._ahead_max or len(self._asked) > self._asked_max

    def _hides(self, name: str) -> bool:
        host = name.removeprefix(_PREFIX)
        return host.startswith("*.") or any(_PREFIX + over in self._hosts for over in wildcards_over(host))


def _name(alias: str) -> str:
    return alias.partition(":")[0]


def order(name: str) -> tuple[int, str]:
    """What is hidden by a wildcard goes before it, so that no request is led by the wildcard meanwhile."""
    return (2 if name == ANY else 1 if name.startswith(_WILDCARD) else 0), name


class Asked:
    """What requests at one Envoy wait for: hostnames with their port (`http/HOST[:PORT]`), which it calls aliases."""

    def __init__(self, hostnames: Hostnames) -> None:
        self._hostnames = hostnames
        self.waiting: dict[str, None] = {}
        self.names: dict[str, list[str]] = {}
        """Virtual host → the aliases that it answers; it is said again where Envoy has it by now, for the sake of what waits."""
        self._told: tuple[str, ...] = ()
        self.missed_until = 0.0
        """Before this, aliases that nobody has are answered only along with others."""

    def add(self, aliases: Iterable[str]) -> None:
        self.waiting.update(dict.fromkeys(aliases))

    def resolve(self) -> None:
        """Find out anew which virtual hosts answer what waits."""
        self.names = {}
        for alias in self.waiting:
            name = self._hostnames.ask(alias)
            if name is not None:
                self.names.setdefault(name, []).append(alias)

    def missed(self, there: Callable[[str], bool], now: float, *, along: bool) -> list[str]:
        """Return the aliases to be told to have nobody: where no virtual host answers, or one that is not `there`.

        `along`: Envoy is told of something else anyway.
        """
        if not self.waiting or (now < self.missed_until and not along):
            return []
        coming = {alias for name, aliases in self.names.items() if there(name) for alias in aliases}
        missed = list(itertools.islice((alias for alias in self.waiting if alias not in coming), MISSED_MAX))
        if missed:
            self.missed_until = now + MISS_PAUSE_S
        return missed

    def told(self, aliases: Iterable[str]) -> None:
        """Note that Envoy is about to be told of these."""
        self._told = tuple(aliases)
        for alias in self._told:
            self.waiting.pop(alias, None)

    def answered(self, *, refused: bool) -> None:
        """Take over Envoy's answer to that; what it refuses is asked for still."""
        if refused:
            self.add(self._told)
        self._told = ()
