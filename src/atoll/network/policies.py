"""Apps' own rules on one node as they are to stand in the firewall's sets: whose they are, who is meant, what names mean. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atoll.model.fabric import Member
from atoll.model.spec import NetworkRules
from atoll.network.rules import Ruled, elements_of

LEARNED_MAX = 64
"""Addresses of one name of a rule, of each version of IP."""


class Policies:
    """`written` is what the sets hold, by set; whoever writes them keeps it."""

    def __init__(self) -> None:
        self.written: dict[str, list[str]] = {}
        self.owners: dict[str, tuple[str, str]] = {}
        """Address → project, and app or job, of every instance that is known."""
        self.left: set[str] = set()
        """Addresses whose holder has gone: what was counted of them is nobody's. Whoever deletes that takes them out."""
        self._ruled: dict[str, Ruled] = {}
        self._members: dict[tuple[str, str], list[str]] = {}
        self._learned: dict[tuple[str, str], list[str]] = {}

    def wanted(self) -> dict[str, list[str]]:
        """Return set → elements; nothing where there are no rules, and were none."""
        if not self._ruled and not any(self.written.values()):
            return {}
        return elements_of(self._ruled.values(), self._members, self._learned)

    def rule(self, address: str, project: str, rules: NetworkRules | None) -> bool:
        """Take in the rules of an instance of this node, or that it has none; return whether anything may be another now."""
        before = self._ruled.pop(address, None)
        if rules is not None:
            self._ruled[address] = Ruled(address, project, rules)
        for key in [key for key in self._learned if key[0] == address]:
            del self._learned[key]
        return before is not None or rules is not None

    def see(self, members: Iterable[Member]) -> set[str]:
        """Take in all instances of the node's projects, wherever they are; return the addresses whose holder has gone.

        Of a project that has no instance on the node any more nothing is heard: its instances elsewhere may be there still.
        """
        before, self._members, self.owners = self.owners, {}, {}
        for member in members:
            self._members.setdefault((member.project, member.owner), []).append(member.address)
            self.owners[member.address] = (member.project, member.owner)
        gone = {address for address, owner in before.items() if self.owners.get(address) != owner}
        self.left |= gone
        heard = {project for project, _ in self.owners.values()}
        return {address for address in gone if before[address][0] in heard}

    def wants_name(self, address: str, name: str) -> str | None:
        """Return the `host` of a rule of the instance at `address` that `name` falls under."""
        ruled = self._ruled.get(address)
        for allow in (ruled.rules.egress or ()) if ruled is not None else ():
            if allow.host == name or (allow.host and allow.host.startswith("*.") and name.endswith(allow.host[1:])):
                return allow.host
        return None

    def learn(self, address: str, host: str, addresses: Sequence[str]) -> bool:
        """Take in what a name of an instance's rules means, the last `LEARNED_MAX` addresses of each version of IP; return whether
        that is news."""
        known = self._learned.get((address, host), [])
        every = [*(one for one in known if one not in addresses), *addresses]
        merged = [one for six in (False, True) for one in [each for each in every if (":" in each) is six][-LEARNED_MAX:]]
        if set(merged) == set(known):
            return False
        self._learned[(address, host)] = merged
        return True
