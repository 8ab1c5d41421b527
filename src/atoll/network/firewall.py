"""What may pass to and from instances: one nftables table, whose sets grow with the instances while its rules do not.

The rules are written by libnftables in this process; what comes and goes with instances, by `elements`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence

from atoll.model.errors import RuntimeFailed, Unsupported
from atoll.model.fabric import PROBE_PORT, VXLAN_PORT, ipv6_network_of, ipv6_of
from atoll.model.spec import Port, PortProtocol
from atoll.network import counted, ipv6_rules
from atoll.network.counted import KEPT_S, PAIRS_MAX, REFUSED_MAX

CLOSED = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local, and with it most clouds' metadata services
    "100.100.100.200/32",  # Alibaba's metadata service
    "168.63.129.16/32",  # Azure's
    "192.0.0.192/32",  # Oracle's
    "224.0.0.0/4",
    "240.0.0.0/4",
)
"""Where no instance may go; a resolver of the node that lies there can be asked for names, and nothing else."""
CONNECTIONS_MAX = 16_384
"""Connections that one instance may have open at a time: a flood of one does not fill the kernel's table for all."""
ASKED_MAX = 1_000
"""Questions for names that one instance may ask in a second: the agent itself answers them."""
CONNECTIONS_TRACKED_MAX = 65_535


def ruleset(
    *,
    table: str,
    prefix: str,
    subnet: str,
    node_address: str,
    resolvers: Iterable[str],
    elements: Iterable[str] = (),
    tunnels: Sequence[str] = (),
    names: bool = False,
    ula: str = "",
    outward: str = "",
    connections_max: int = CONNECTIONS_MAX,
) -> str:
    """Return the commands that replace the whole table in one transaction. `prefix` starts the name of every link, `tunnels`
    are those to other nodes, and with `names` instances may ask the node itself for names. With `ula`, the cell's IPv6 network,
    all IPv6 is dropped until `ipv6_rules.rules` are there; without it for good. `outward` is the address that the world sees of
    instances by IPv6; without it the node's own, of the link that they leave by.

    Each hook and each rule costs every packet: established connections pass after as few as can be, and the VXLAN's own packets
    are in no connection table. Nothing has a drop policy: what does not touch our links, bridged traffic included, is none of our
    business. What is refused is answered, so that nobody waits for it: with a reset where that is possible, as the kernel limits
    ICMP.
    """
    links = f'"{prefix}*"'
    named = ", ".join(resolvers)
    fabric = "{ " + ", ".join(f'"{tunnel}"' for tunnel in tunnels or ("atoll-none",)) + " }"
    asking = f"ip daddr {node_address} udp dport 53 update @askers {{ ip saddr limit rate over {ASKED_MAX}/second }} drop"
    ask = f"ip daddr {node_address} meta l4proto {{ tcp, udp }} th dport 53 accept" if names else ""
    chains_six = ipv6_rules.chains(ula=ula, links=links, fabric=fabric) if ula else ""

    translated = f"snat ip6 to {outward}" if outward else "masquerade"
    inner = ipv6_network_of(ula) if ula else ""
    ours = f"ip6 saddr {inner} ip6 saddr != {ipv6_of(ula, node_address)}" if ula else ""
    out_six = f"{ours} oifname != {links} oifname != {fabric} {translated}" if ula else ""
    lead_six = "meta l4proto { tcp, udp } ip6 daddr != ::1 fib daddr type local goto published_six" if ula else ""

    def of_six(verdict: str, otherwise: str = "") -> str:
        return f"meta nfproto ipv6 {verdict}" if ula else otherwise

    return f"""
table inet {table}
delete table inet {table}
table inet {table} {{
  set sources {{ type ifname . ipv4_addr; }}
  set inbound {{ type ipv4_addr . inet_proto . inet_service; }}
  set plain {{ type ipv4_addr . inet_service; }}
  map published {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
  set resolvers {{ type ipv4_addr; {f"elements = {{ {named} }}" if named else ""} }}
  set closed {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {", ".join((*CLOSED, subnet))} }} }}
  map project_of {{ type ipv4_addr : mark; }}
  set member {{ type ipv4_addr . mark; }}
  set peers {{ type ipv4_addr; flags interval; }}
  set nodes {{ type ipv4_addr; }}
  set endpoints {{ type ipv4_addr; }}
  set vxlans {{ typeof @th,96,24; }}
  set guarded {{ type ipv4_addr; }}
  set admitted {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }}
  set fenced {{ type ipv4_addr; }}
  set permitted {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }}
  set limited {{ type ipv4_addr; }}
  set bytes_out {{ type ipv4_addr; limit rate over 1 mbytes/second; }}
  set bytes_in {{ type ipv4_addr; limit rate over 1 mbytes/second; }}
  set packets_out {{ type ipv4_addr; limit rate over 1000/second; }}
  set packets_in {{ type ipv4_addr; limit rate over 1000/second; }}
  set askers {{ type ipv4_addr; size {CONNECTIONS_TRACKED_MAX}; flags dynamic,timeout; timeout 10s; }}
  set pairs {{ type ipv4_addr . ipv4_addr; size {PAIRS_MAX}; flags dynamic,timeout; timeout {KEPT_S}s; }}
  set begun {{ type ipv4_addr . ipv4_addr; size {PAIRS_MAX}; flags dynamic,timeout; timeout {KEPT_S}s; }}
  set turned_away {{
    type ipv4_addr . ipv4_addr . inet_proto . inet_service . mark
    size {REFUSED_MAX}; flags dynamic,timeout; timeout {KEPT_S}s
  }}
  set opened {{ type ipv4_addr; size {CONNECTIONS_TRACKED_MAX}; flags dynamic,timeout; timeout {KEPT_S}s; }}
  set over {{ type ipv4_addr; size {CONNECTIONS_TRACKED_MAX}; flags dynamic,timeout; timeout {KEPT_S}s; }}
  set connections {{ type ipv4_addr; size {CONNECTIONS_TRACKED_MAX}; flags dynamic; }}
  set world {{ type ipv6_addr; flags interval; }}
  set uplinks {{ type ifname; }}
  set admitted_six {{ type ipv4_addr . ipv6_addr . inet_proto . inet_service; flags interval; }}
  set permitted_six {{ type ipv4_addr . ipv6_addr . inet_proto . inet_service; flags interval; }}
  set turned_away_six {{
    type ipv4_addr . ipv6_addr . inet_proto . inet_service . mark
    size {REFUSED_MAX}; flags dynamic,timeout; timeout {KEPT_S}s
  }}
{chains_six}
  chain refused {{
    {of_six("meta l4proto { tcp, udp } jump turned_away_six")}
    meta l4proto {{ tcp, udp }} update @turned_away {{ ip saddr . ip daddr . meta l4proto . th dport . meta mark counter }}
    meta l4proto tcp reject with tcp reset
    reject
  }}
  chain origin {{
    type filter hook prerouting priority raw; policy accept;
    iifname {links} goto from_link
    iifname {fabric} goto from_others
    udp dport {VXLAN_PORT} @th,96,24 @vxlans notrack
  }}
  chain from_link {{
    iifname . ip saddr != @sources drop
    {of_six("goto from_link_six", "meta nfproto ipv6 drop")}
    ip saddr @limited jump limits_out
    ip daddr {node_address} tcp flags & (syn|ack) != syn ip saddr . tcp sport @plain notrack
  }}
  chain from_others {{
    ip saddr != @peers drop
    {of_six("goto from_others_six", "meta nfproto ipv6 drop")}
  }}
  chain outer {{
    type filter hook output priority raw; policy accept;
    oifname {links} ip saddr {node_address} ip daddr . tcp dport @plain notrack
    udp dport {VXLAN_PORT} @th,96,24 @vxlans notrack
  }}
  chain limits_out {{
    ip saddr @packets_out update @over {{ ip saddr counter }} drop
    ip saddr @bytes_out update @over {{ ip saddr counter }} drop
  }}
  chain limits_in {{
    ip daddr @packets_in update @over {{ ip daddr counter }} drop
    ip daddr @bytes_in update @over {{ ip daddr counter }} drop
  }}
  chain crowded {{
    ct state new update @opened {{ ip saddr counter }}
    ct state new add @connections {{ ip saddr ct count over {connections_max} }} drop
    {of_six("ct state new jump crowded_six")}
  }}
  chain to_node {{
    type filter hook input priority filter; policy accept;
    iifname {links} ct state untracked tcp flags & (syn|ack) != syn accept
    iifname {fabric} jump from_tunnel
    udp dport {VXLAN_PORT} @th,96,24 @vxlans ip saddr != @endpoints drop
    iifname != {links} accept
    {asking if names else ""}
    ct state established,related accept
    jump crowded
    {ask}
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    meta mark set {counted.NODE} jump refused
  }}
  chain from_tunnel {{
    ct state established,related accept
    ip saddr @nodes udp dport {PROBE_PORT} accept
    ip saddr @nodes icmp type echo-request accept
    meta mark set {counted.NODE} jump refused
  }}
  chain private {{
    meta mark set 0
    meta mark set ip saddr map @project_of
    ip daddr . meta mark @member goto same_project
    meta mark set {counted.PROJECT} jump refused
  }}
  chain same_project {{
    meta mark set 0
    iifname {links} update @begun {{ ip saddr . ip daddr counter }} update @pairs {{ ip saddr . ip daddr counter }}
    ip saddr @fenced jump fence
    oifname {fabric} accept
    goto open_ports
  }}
  chain fence {{
    ip saddr . ip daddr . meta l4proto . th dport @permitted return
    meta mark set {counted.EGRESS} jump refused
  }}
  chain guard {{
    ip daddr . ip saddr . meta l4proto . th dport @admitted return
    meta mark set {counted.INGRESS} jump refused
  }}
  chain open_ports {{
    ip daddr @guarded jump guard
    ip daddr . meta l4proto . th dport @inbound accept
    icmp type echo-request accept
    meta mark set {counted.PORT} jump refused
  }}
  chain known {{
    iifname {links} oifname {links} update @pairs {{ ip saddr . ip daddr counter }} accept
    iifname {links} oifname {fabric} update @pairs {{ ip saddr . ip daddr counter }}
    {of_six("goto known_six")}
    accept
  }}
  chain between {{
    type filter hook forward priority filter; policy accept;
    oifname {fabric} tcp flags & (syn|rst) == syn tcp option maxseg size set rt mtu
    oifname {links} ip daddr @limited jump limits_in
    ct state established,related goto known
    {of_six("goto between_six")}
    iifname {links} jump crowded
    iifname {fabric} oifname {fabric} ip daddr @peers accept
    iifname {fabric} oifname != {links} drop
    oifname {fabric} iifname != {links} drop
    iifname {links} udp dport {VXLAN_PORT} ip daddr @endpoints meta mark set {counted.NODE} jump refused
    iifname {links} oifname {links} jump private
    iifname {links} oifname {fabric} jump private
    iifname {fabric} ip saddr @nodes ip daddr . meta l4proto . th dport @inbound accept
    iifname {fabric} ip saddr @nodes meta mark set {counted.PORT} jump refused
    iifname {fabric} jump private
    oifname {links} ip daddr @guarded ip daddr . ip saddr . meta l4proto . th dport != @admitted drop
    oifname {links} ct status dnat ip daddr . meta l4proto . th dport @inbound accept
    oifname {links} drop
    iifname != {links} accept
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    ip daddr @closed meta mark set {counted.CLOSED} jump refused
    ip daddr @peers meta mark set {counted.CLOSED} jump refused
    ip saddr @fenced jump fence
  }}
  chain from_node {{
    type filter hook output priority filter; policy accept;
    oifname != {links} accept
    ip daddr @limited jump limits_in
    {of_six("goto from_node_six")}
    ct state established,related accept
    ip daddr . meta l4proto . th dport @inbound accept
    meta mark set {counted.PORT} jump refused
  }}
  chain published_to_others {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname {links} accept
    meta l4proto {{ tcp, udp }} ip daddr != 127.0.0.0/8 fib daddr type local dnat ip to meta l4proto . th dport map @published
    {lead_six}
  }}
  chain published_to_node {{
    type nat hook output priority -100; policy accept;
    meta l4proto {{ tcp, udp }} ip daddr != 127.0.0.0/8 fib daddr type local dnat ip to meta l4proto . th dport map @published
    {lead_six}
  }}
  chain outward {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {subnet} ip saddr != {node_address} oifname != {links} oifname != {fabric} masquerade
    {out_six}
  }}
}}
""" + "\n".join(elements)  # noqa: S608 - an update of a firewall's set


def inbound(address: str, ports: Sequence[Port]) -> list[str]:
    """Return the elements of `inbound` for an instance's declared ports."""
    return sorted({f"{address} . {'udp' if port.protocol is PortProtocol.UDP else 'tcp'} . {port.port}" for port in ports})


def plain(address: str, ports: Sequence[Port]) -> list[str]:
    """Return the elements of `plain`: TCP ports between which and the node itself no connection need be tracked.

    What the node begins is let through by the port alone, and of what comes from there only what begins nothing. Where a port is
    published the node's own calls of that are translated, and so tracked.
    """
    if any(port.host is not None for port in ports):
        return []
    return sorted({f"{address} . {port.port}" for port in ports if port.protocol is not PortProtocol.UDP})


def published(address: str, ports: Sequence[Port]) -> list[str]:
    """Return the elements of `published` for those of an instance's ports that are published on the node."""
    return sorted(
        {
            f"{'udp' if port.protocol is PortProtocol.UDP else 'tcp'} . {port.host} : {address} . {port.port}"
            for port in ports
            if port.host is not None
        }
    )


def add(table: str, name: str, elements: Sequence[str]) -> str:
    return f"add element inet {table} {name} {{ {', '.join(elements)} }}" if elements else ""


class Nftables:
    """libnftables; calls from any thread are made one at a time. Each call is one transaction."""

    def __init__(self) -> None:
        """Raises Unsupported where the library is not installed."""
        try:
            self._library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise Unsupported(f"libnftables: {error}", mend="install nftables (apt-get install nftables)") from None
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_buffer_output(self._context)
        self._lock = threading.Lock()

    def run(self, *commands: str) -> None:
        """Apply all `commands` or none. Raises RuntimeFailed with the library's words."""
        text = "\n".join(filter(None, commands))
        if not text:
            return
        with self._lock:
            code = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
            if code != 0:
                words: bytes = self._library.nft_ctx_get_error_buffer(self._context) or b""
                lines = words.decode(errors="replace").strip().splitlines()
                first = lines[0] if lines else "no reason given"
                mend = "run as root with CAP_NET_ADMIN" if "not permitted" in first else None
                raise RuntimeFailed(f"nftables: {first}", mend=mend)

    def close(self) -> None:
        with self._lock:
            if self._context:
                self._library.nft_ctx_free(self._context)
                self._context = ctypes.c_void_p()
