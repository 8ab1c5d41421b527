"""The network of one node on its kernel: `LinkNetwork` gives each instance a prepared slot and opens its declared ports."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec import Struct, structs

from atoll.model.errors import AtollError, Unavailable
from atoll.model.fabric import FabricNode, Member
from atoll.model.flows import Flows
from atoll.model.ports.network import Counters, Link
from atoll.model.spec import NetworkRules, Port, host_ports
from atoll.network import counted, elements, firewall, ipv6_rules, resolvers
from atoll.network.addresses import AddressPool
from atoll.network.elements import ElementSocket
from atoll.network.ledger import Entry, Ledger
from atoll.network.listening import taken_ports
from atoll.network.namespaces import is_namespace
from atoll.network.outward import Outward, let_forward, uplinks
from atoll.network.policies import Policies
from atoll.network.pool import SlotPool
from atoll.network.private import Private, of_nodes
from atoll.network.slots import Slot, SlotMaker, tag_of
from atoll.network.sysctls import FORWARDING, forward_ipv6, read_sysctl, restore_forwarding, write_sysctl
from atoll.network.together import Together
from atoll.network.tunnels import names_of
from atoll.network.upkeep import Upkeep

PREPARED_DEFAULT = 32
"""Slots made ahead, so that as many starts in one moment wait for none. One takes 2 ms to make, and some 300 KiB of the kernel."""
RULES_CHECK_S = 2.0
"""Seconds within which rules that somebody removed are back, and a way to the world by IPv6 is seen to come or to go."""

log = structlog.get_logger()


class _Held(Struct, frozen=True):
    """A slot in use."""

    slot: Slot
    entry: Entry


class _Open:
    """What exists while the network is in use."""

    def __init__(self, maker: SlotMaker, nftables: firewall.Nftables, sets: ElementSocket, pool: SlotPool) -> None:
        self.maker, self.nftables, self.sets, self.pool = maker, nftables, sets, pool


class LinkNetwork:
    """Implements `Network` with a namespace and a routed link for each instance. Linux, as root.

    `directory` is this network's own, and names its links: two of them on one machine do not touch each other, but need
    different subnets. Turns on IPv4 forwarding on the node. Nothing is done before the first call.
    """

    def __init__(
        self,
        subnet: str = "10.64.0.0/16",
        directory: Path = Path("/var/lib/atoll/agent/network"),
        *,
        prepared: int = PREPARED_DEFAULT,
        resolver_sources: Sequence[Path] = resolvers.SOURCES,
        rules_check_s: float = RULES_CHECK_S,
        names: bool = False,
        ula: str = "",
        outward: Outward | None = None,
        connections_max: int = firewall.CONNECTIONS_MAX,
    ) -> None:
        """With `names`, instances ask the node itself for names, at `node_address`. With `ula`, the cell's IPv6 network, they have
        IPv6 addresses of it, and with `outward` they reach the world by IPv6 as long as that finds a way. Raises Invalid for a
        subnet that is none."""
        self.ula = ula
        self._outward = outward if ula else None
        self._connections_max = connections_max
        self.outward = ""
        """The node's IPv6 address by which instances reach the world now; for reading from outside."""
        self._ways: dict[str, list[str]] = {}
        """Set → elements that say where IPv6 leads beyond the cell."""
        self._addresses = AddressPool(subnet)
        self._directory = directory
        self._prepared = prepared
        self._sources = tuple(resolver_sources)
        self._table = f"atoll_{tag_of(directory)}"
        self._resolv_conf = directory / "resolv.conf"
        self._ledger = Ledger(directory / "links")
        self._held: dict[str, _Held] = {}
        self._state: _Open | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._resolves = False
        self._servers: tuple[str, ...] = ()
        self._keeper: asyncio.Task[None] | None = None
        self._rules_check_s = rules_check_s
        self._names = names
        self._forwarders: tuple[str, ...] = ()
        self._projects: dict[str, str] = {}
        """Address → project, of this node's instances."""
        self._with_ipv6: set[str] = set()
        """Addresses of those that have an IPv6 one."""
        self._private = Private(self._addresses.network)
        self._around: dict[str, list[str]] = {}
        """Set → elements that say who the other nodes are."""
        self._policies = Policies()
        self._uncut: set[str] = set()
        """Addresses of other nodes' instances that have gone, whose connections may still be in the kernel's table."""
        self._admissions = Together(self._admit, self._lost)

    @property
    def node_address(self) -> str:
        return self._addresses.node_address

    @property
    def forwarders(self) -> tuple[str, ...]:
        """The node's own name servers, as far as an instance could ask them."""
        return self._forwarders

    @property
    def ready(self) -> int:
        """How many slots are ready for whoever comes next."""
        return len(self._state.pool.ready) if self._state is not None else 0

    def project_at(self, address: str) -> str | None:
        """Return the project of this node's instance that has `address`."""
        return self._projects.get(address)

    def has_ipv6(self, address: str) -> bool:
        """Return whether this node's instance that has `address` has IPv6."""
        return address in self._with_ipv6

    def links(self) -> dict[str, tuple[str, str]]:
        """Return instance → its address and the node's end of its link."""
        return {id: (held.slot.address, held.slot.interface) for id, held in self._held.items()}

    def counters(self) -> Mapping[str, Counters]:
        devices = {}
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
            name, _, rest = line.partition(":")
            devices[name.strip()] = [int(word) for word in rest.split()]
        found = {}
        for id, (_, interface) in self.links().items():
            numbers = devices.get(interface)
            if numbers is not None:  # what the node's end receives the instance has sent
                found[id] = Counters(numbers[0], numbers[1], numbers[8], numbers[9], numbers[3] + numbers[11])
        return found

    async def flows(self) -> Flows:
        if self._state is None:
            return Flows()
        ids = {address: id for id, (address, _) in self.links().items()}
        # Who has an address now may be heard of later than that it has it.
        owners = {
            address: owner for address, owner in self._policies.owners.items() if self._projects.get(address, owner[0]) == owner[0]
        }
        left, self._policies.left = self._policies.left, set()
        try:
            await asyncio.to_thread(counted.forget, self._table, left, self._state.sets)
        except BaseException:
            self._policies.left |= left
            raise
        return await asyncio.to_thread(counted.count, self._table, owners, ids)

    def foresee(self, own: FabricNode, nodes: Mapping[str, FabricNode], members: Iterable[Member], number: int | None) -> None:
        """Take in what an earlier agent was told with `see`, so that the rules have it from the first moment that they are written.

        Before the first call of anything else; afterwards it does nothing.
        """
        if self._state is None:
            members = list(members)
            for _ in self._private.see(nodes, members):
                pass
            self._around = of_nodes(own, nodes, number)
            self._policies.see(members)

    async def see(
        self, own: FabricNode, nodes: Mapping[str, FabricNode], members: Iterable[Member], number: int | None = None
    ) -> None:
        """Let pass what the other nodes' instances and this one's of the same project send each other.

        What is left out of `nodes` and `members` is shut out. The VXLAN `number` is taken from the site's nodes only.
        Safe to repeat. Raises RuntimeFailed.
        """
        opened = await self._open()
        members = list(members)
        for delete, add in self._private.see(nodes, members):
            opened.sets.change(add=add, delete=delete)
        self._around = self._flush(opened, self._around, of_nodes(own, nodes, number))
        # This node's own are cut when their slots go, before anybody has the address again.
        self._uncut |= {one for one in self._policies.see(members) if ipaddress.IPv4Address(one) not in self._addresses.network}
        self._write_policies(opened)

    async def cut_gone(self) -> None:
        """Delete from the kernel's table of connections what instances of other nodes have left there that `see` found gone.

        Takes as long as the table is large. Safe to repeat. Raises RuntimeFailed.
        """
        if cut := tuple(self._uncut):
            opened = await self._open()
            await asyncio.to_thread(opened.maker.cut, cut)
            self._uncut.difference_update(cut)

    def wants_name(self, address: str, name: str) -> str | None:
        """Return the `host` of a rule of the instance at `address` that `name` falls under."""
        return self._policies.wants_name(address, name)

    def learn_name(self, address: str, host: str, addresses: Sequence[str]) -> None:
        """Let the instance go to what a name of its rules means; the last `LEARNED_MAX` addresses of each count."""
        if self._state is not None and self._policies.learn(address, host, addresses):
            self._write_policies(self._state)

    def _write_policies(self, opened: _Open) -> None:
        wanted = self._policies.wanted()
        if wanted:
            self._policies.written = self._flush(opened, self._policies.written, wanted)

    def _flush(self, opened: _Open, before: Mapping[str, list[str]], now: dict[str, list[str]]) -> dict[str, list[str]]:
        """Replace the sets that differ, all in one transaction."""
        commands = []
        for name, values in now.items():
            if values != before.get(name, []):
                commands += [f"flush set inet {self._table} {name}", firewall.add(self._table, name, values)]
        opened.nftables.run(*commands)
        return now

    async def attach(self, id: str, *, project: str, ports: Sequence[Port], rules: NetworkRules | None = None) -> Link:
        opened = await self._open()
        held = self._held.get(id)
        if held is not None:
            self._check_published(id, ports)
            if held.entry.rules != rules:
                held = self._held[id] = _Held(held.slot, structs.replace(held.entry, rules=rules))
                self._ledger.write([held.entry])
                if self._policies.rule(held.slot.address, project, rules):
                    self._write_policies(opened)
            held = self._change_ports(opened, held, tuple(ports))
            await self._lead(opened, [held.slot] if host_ports(ports) else [])
            return self._link(held)
        self._check_published(id, ports)
        slot = await opened.pool.take()
        held = _Held(slot, Entry(id=id, project=project, number=slot.number, ports=tuple(ports), rules=rules))
        try:
            await self._admissions.ask(held)  # cancelled meanwhile: what comes about nevertheless is the instance's until `detach`
        except (AtollError, OSError) as error:
            await opened.pool.remove(slot.number)
            if isinstance(error, OSError):
                raise Unavailable(f"cannot note down the link of {id}: {error}", mend="free space on the disk") from error
            raise
        await self._lead(opened, [held.slot] if host_ports(ports) else [])
        return self._link(held)

    def _admit(self, many: Sequence[_Held]) -> None:
        """Give the slots to their instances and open their ports: all, or none. Raises OSError, RuntimeFailed."""
        assert self._state is not None  # noqa: S101 - whoever asked has a slot of it
        try:
            # The ledger first: a slot that nobody is known to have is removed by the next agent.
            self._ledger.write([each.entry for each in many], handed_out=True)
            news = [self._policies.rule(each.slot.address, each.entry.project, each.entry.rules) for each in many]
            if any(news):
                self._write_policies(self._state)  # before anything is open
            parts = []
            for each in many:
                address, ports = each.slot.address, each.entry.ports
                parts += [elements.inbound(address, ports), elements.plain(address, ports)]
                if host_ports(ports):
                    parts.append(elements.published(address, ports))
                parts += self._private.admit(address, each.entry.project)
            self._state.sets.change(add=elements.merged(parts))
        except (AtollError, OSError):
            self._ledger.remove([each.slot.number for each in many])
            for each in many:
                self._private.gone(each.slot.address)
                self._policies.rule(each.slot.address, each.entry.project, None)
            raise
        for each in many:
            self._know(each)

    def _know(self, held: _Held) -> None:
        self._projects[held.slot.address] = held.entry.project
        if held.slot.ipv6:
            self._with_ipv6.add(held.slot.address)
        self._held[held.entry.id] = held

    def _lost(self, held: _Held) -> None:
        if self._state is not None:
            self._state.pool.discard(held.slot.number)

    async def detach(self, id: str) -> None:
        opened = await self._open()
        held = self._held.get(id)
        if held is not None:
            self._shut(opened, held)
            await opened.pool.remove(held.slot.number)

    async def recover(self, keep: Sequence[str]) -> Sequence[Link]:
        opened = await self._open()
        wanted = dict.fromkeys(keep)
        others = [held for id, held in self._held.items() if id not in wanted]
        for held in others:
            self._shut(opened, held)
        await asyncio.gather(*(opened.pool.remove(held.slot.number) for held in others))
        return tuple(self._link(self._held[id]) for id in wanted if id in self._held)

    async def close(self) -> None:
        """Let go without ending a link; what was made ahead goes, and with the last link all else that was set up."""
        self._closed = True
        async with self._opening:
            opened, self._state = self._state, None
        if opened is None:
            return
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        idle = await opened.pool.close()
        if self._held:
            opened.sets.change(delete=[elements.source(slot.interface, slot.address) for slot in idle])
        else:
            opened.nftables.run(f"table inet {self._table}", f"delete table inet {self._table}")
            opened.maker.close_subnet()
        self._ledger.close()
        opened.maker.close()
        opened.nftables.close()
        opened.sets.close()

    def _write_rules(
        self, maker: SlotMaker, nftables: firewall.Nftables, sets: ElementSocket, held: Iterable[_Held], slots: Iterable[Slot]
    ) -> None:
        """Replace the whole table: `slots` may send, and the ports of `held` are open."""
        held = list(held)
        ports = [element for each in held for element in firewall.inbound(each.slot.address, each.entry.ports)]
        plain = [element for each in held for element in firewall.plain(each.slot.address, each.entry.ports)]
        published = [element for each in held for element in firewall.published(each.slot.address, each.entry.ports)]
        tunnels = tuple(names_of(tag_of(self._directory)).values())
        nftables.run(
            firewall.ruleset(
                table=self._table,
                prefix=maker.prefix,
                subnet=str(self._addresses.network),
                node_address=self._addresses.node_address,
                resolvers=self._servers,
                tunnels=tunnels,
                names=self._names,
                ula=self.ula,
                outward=self._outward.address if self._outward is not None else "",
                connections_max=self._connections_max,
                elements=[
                    *(
                        firewall.add(self._table, name, values)
                        for part in (self._private.text(), self._around, self._policies.written, self._ways)
                        for name, values in part.items()
                    ),
                    firewall.add(self._table, "sources", [f'"{slot.interface}" . {slot.address}' for slot in slots]),
                    firewall.add(self._table, "inbound", ports),
                    firewall.add(self._table, "plain", plain),
                    firewall.add(self._table, "published", published),
                ],
            )
        )
        if self.ula:
            most = self._connections_max
            sets.replace_rules(ipv6_rules.rules(ula=self.ula, links=maker.prefix, tunnels=tunnels, connections_max=most))

    async def _keep_rules(self, opened: _Open) -> None:
        """Write the rules again when somebody has removed them, as a restart of Debian's nftables service does, or they are half
        there; turn forwarding on again, as after `sysctl --system` with other settings. Never returns."""
        known = elements.source("lo", self._addresses.node_address)

        def slots() -> list[Slot]:
            return [*(each.slot for each in self._held.values()), *opened.pool.ready]

        upkeep = Upkeep(
            lambda: opened.sets.intact(known),
            lambda: self._write_rules(opened.maker, opened.nftables, opened.sets, list(self._held.values()), slots()),
        )
        while True:
            await asyncio.sleep(self._rules_check_s)
            with_ipv6 = [slot.interface for slot in slots() if slot.ipv6]
            try:
                if restore_forwarding([*with_ipv6, *names_of(tag_of(self._directory)).values()] if with_ipv6 else ()):
                    log.warning("network.forwarding-on", message="somebody turned forwarding off on this node; it is on again")
            except AtollError as error:
                log.error("network.forwarding-off", message=str(error))
            try:
                if upkeep.look():
                    log.error("network.rules-restored", message="the firewall's rules were not whole; they have been written again")
                if self.ula:
                    self._ways = self._flush(opened, self._ways, self._look_outward(opened.maker))
                    await self._lead(opened, slots())
            except (AtollError, OSError) as error:  # OSError: netlink gave no answer in time, or had no room
                log.error("network.rules-missing", message=str(error))

    def _look_outward(self, maker: SlotMaker) -> dict[str, list[str]]:
        """Return set → elements that say where IPv6 leads beyond the cell now. Raises RuntimeFailed."""
        found = self._outward.find() if self._outward is not None else ""
        if found != self.outward:
            said = f"instances reach the world by IPv6 as {found}" if found else "instances reach the world by IPv4 alone"
            log.info("network.outward-ipv6", message=said)
        self.outward = found
        maker.outward = bool(found)
        by = let_forward(uplinks((maker.prefix, *names_of(tag_of(self._directory)).values())))
        return {"world": list(ipv6_rules.WORLD) if found else [], "uplinks": [f'"{name}"' for name in by]}

    async def _lead(self, opened: _Open, slots: Sequence[Slot]) -> None:
        """Give the slots the IPv6 route that they are to have: to everywhere where there is a way, or who asks may be anywhere."""
        published = {each.slot.number for each in self._held.values() if host_ports(each.entry.ports)}

        def change() -> None:
            for slot, outward in behind:
                try:
                    opened.maker.lead(slot, outward)
                except (AtollError, OSError) as error:
                    if is_namespace(slot.netns):  # else it has gone meanwhile
                        log.warning("network.not-led", link=slot.interface, message=str(error))

        wanted = [(slot, bool(self.outward) or slot.number in published) for slot in slots if slot.ipv6]
        behind = [(slot, outward) for slot, outward in wanted if opened.maker.leads(slot) is not outward]
        if behind:
            await asyncio.to_thread(change)

    def _link(self, held: _Held) -> Link:
        slot = held.slot
        return Link(
            id=held.entry.id,
            netns=slot.netns,
            address=slot.address,
            interface=slot.interface,
            ipv6=slot.ipv6 or None,
            resolv_conf=self._resolv_conf if self._resolves else None,
        )

    def _check_published(self, id: str, ports: Sequence[Port]) -> None:
        """Raise Unavailable where a port of the node is another instance's, or a program's of the machine."""
        wanted = host_ports(ports)
        if not wanted:
            return
        others = {port: other for other, held in self._held.items() if other != id for port in host_ports(held.entry.ports)}
        programs = taken_ports()
        for port in wanted:
            if port in others or port in programs:
                who = f"instance {others[port]} has it" if port in others else "a program of this machine listens on it"
                mend = "wait until it is gone" if port in others else "stop the program, or choose another ports.host"
                raise Unavailable(f"the port {port} of this node is taken: {who}", mend=mend)

    def _change_ports(self, opened: _Open, held: _Held, ports: tuple[Port, ...]) -> _Held:
        """Open `ports` instead of those that were; the same again costs nothing."""
        if held.entry.ports == ports:
            return held
        entry = structs.replace(held.entry, ports=ports)
        self._ledger.write([entry])
        add, delete = [elements.published(held.slot.address, ports)], []
        for kind in (elements.inbound, elements.plain):
            name, old = kind(held.slot.address, held.entry.ports)
            _, new = kind(held.slot.address, ports)
            add.append((name, [key for key in new if key not in old]))
            delete.append((name, [key for key in old if key not in new]))
        # A port that leads elsewhere now must go before it comes again.
        opened.sets.change(delete=[elements.published(held.slot.address, held.entry.ports)])
        opened.sets.change(add=add, delete=delete)
        changed = self._held[entry.id] = _Held(held.slot, entry)
        return changed

    def _shut(self, opened: _Open, held: _Held) -> None:
        """Let nothing through any more, and forget whose the slot was. From here on a crash cannot give it to anybody."""
        self._ledger.remove([held.slot.number])
        slot = held.slot
        ports = held.entry.ports
        opened.sets.change(
            delete=[
                elements.published(slot.address, ports),
                elements.inbound(slot.address, ports),
                elements.plain(slot.address, ports),
                elements.source(slot.interface, slot.address),
                *self._private.forget(slot.address),
            ]
        )
        self._private.gone(slot.address)
        self._policies.left.add(slot.address)
        self._projects.pop(slot.address, None)
        self._with_ipv6.discard(slot.address)
        if self._policies.rule(slot.address, held.entry.project, None):
            self._write_policies(opened)
        del self._held[held.entry.id]  # only now: what could not be shut can be tried again

    async def _open(self) -> _Open:
        """Find out what an earlier agent left, and set up what all links need; once."""
        if self._state is not None:
            return self._state
        async with self._opening:
            if self._closed:
                raise Unavailable("the network has been closed")
            if self._state is None:
                nftables = firewall.Nftables()
                maker = SlotMaker(tag_of(self._directory), self._addresses, self.ula)
                sets = ElementSocket(self._table)
                try:
                    self._ledger.open()
                    await asyncio.to_thread(self._take_over, maker, nftables, sets)
                except BaseException:
                    self._ledger.close()
                    maker.close()
                    nftables.close()
                    sets.close()
                    raise

                def admit(slot: Slot) -> None:
                    sets.change(add=[elements.source(slot.interface, slot.address)])

                pool = SlotPool(maker, self._addresses, prepared=self._prepared, admit=admit)
                pool.start()
                self._state = _Open(maker, nftables, sets, pool)
                self._keeper = asyncio.create_task(self._keep_rules(self._state), name="network-rules")
            return self._state

    def _take_over(self, maker: SlotMaker, nftables: firewall.Nftables, sets: ElementSocket) -> None:
        entries = {entry.number: entry for entry in self._ledger.load()}
        whole, broken = maker.find()
        # Those without a slot, too: somebody removed the link by hand, and what was open of it is still there.
        maker.remove(list(broken | (whole.keys() ^ entries.keys())))
        self._ledger.remove(list(entries.keys() - whole.keys()))
        self._ledger.compact()
        maker.check_overlap()
        if read_sysctl(FORWARDING) == "0":
            write_sysctl(FORWARDING, "1")
            log.warning("network.forwarding-on", message="IPv4 forwarding was off on this node and has been turned on")
        if self.ula and forward_ipv6():
            log.warning("network.forwarding-on", message="IPv6 forwarding was off on this node and has been turned on")
        named = resolvers.read(self._sources)
        self._forwarders = named.servers
        if self._names:
            named = resolvers.asking(self._addresses.node_address, named)
        self._resolves = bool(named.servers)
        if not self._resolves:
            log.warning("network.no-resolver", message="no name server of this node can be reached from an instance")
        self._resolv_conf.write_text(named.text)
        held = [_Held(slot, entries[number]) for number, slot in whole.items() if number in entries]
        self._servers = self._forwarders
        for each in held:
            self._private.admit(each.slot.address, each.entry.project)
            self._know(each)
            self._policies.rule(each.slot.address, each.entry.project, each.entry.rules)
        self._policies.written = self._policies.wanted()
        if self.ula:
            self._ways = self._look_outward(maker)
        self._write_rules(maker, nftables, sets, held, [each.slot for each in held])
        maker.open_subnet()
        for each in held:
            maker.connect(each.slot)
        self._addresses.claim(each.slot.number for each in held)
        last = self._ledger.last()
        if last is not None:
            self._addresses.go_on_after(last)
