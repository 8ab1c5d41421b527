"""WireGuard: the node's key, and the device, the kernel's where it has one, else `wireguard-go`. Everything here blocks.

`wg` (wireguard-tools) tells both what to do. The program of the second kind outlives the agent, as the kernel's device does.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import AtollError, RuntimeFailed, Unsupported
from atoll.model.fabric import FabricNode
from atoll.network import netlink, tunnel_requests

COMMAND_S = 10.0
"""The longest that `wg` or the start of `wireguard-go` may take."""
KEEPALIVE_S = 20
"""So that a node behind an address translation stays reachable."""


class Key(Struct, frozen=True):
    """A WireGuard key pair, in WireGuard's base64."""

    private: str
    public: str
    made_at: float


def new_key(now: float) -> Key:
    private = X25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    return Key(base64.b64encode(private.private_bytes_raw()).decode(), base64.b64encode(public).decode(), now)


def kept_key(file: Path, now: float, *, after: float = 0.0) -> Key:
    """Return the key in `file` if it was made after `after`, else a new one that is kept there (0600). Raises OSError."""
    try:
        key = codec.decode(file.read_bytes(), Key)
        if key.made_at > after:
            return key
    except (OSError, AtollError):
        pass
    key = new_key(max(now, after + 0.001))
    partial = file.with_name(file.name + ".new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as written:
        written.write(codec.encode(key))
    partial.replace(file)
    return key


def missing(routes: netlink.RouteSocket, name: str) -> str:
    """Return what keeps this machine from WireGuard, or nothing. Tries the kernel's with a device called `name`, if need be."""
    if shutil.which("wg") is None:
        return "wireguard-tools is not installed"
    if shutil.which("wireguard-go") is not None:
        return ""
    try:
        routes.send(tunnel_requests.add_wireguard(name, mtu=1280))
        routes.send(tunnel_requests.delete_link(socket.if_nametoindex(name)))
    except (RuntimeFailed, OSError):
        return "this kernel has none, and wireguard-go is not installed"
    return ""


def make_device(name: str, routes: netlink.RouteSocket, *, mtu: int) -> None:
    """Make the device unless it is there. Raises Unsupported, RuntimeFailed."""
    try:
        socket.if_nametoindex(name)
        return
    except OSError:
        pass
    try:
        routes.send(tunnel_requests.add_wireguard(name, mtu=mtu))
        return
    except RuntimeFailed as error:
        program = shutil.which("wireguard-go")
        if program is None:
            why = f"{error}; and wireguard-go is not installed"
            raise Unsupported(f"no WireGuard: {why}", mend="apt-get install wireguard-go wireguard-tools") from None
    # Its words go nowhere: what it inherits stays open for as long as it runs, and it outlives us.
    environment = {"PATH": os.environ.get("PATH", ""), "LOG_LEVEL": "silent"}
    _run([program, name], environment=environment, heard=False)
    routes.send(tunnel_requests.set_mtu(socket.if_nametoindex(name), mtu))


def configure(name: str, key: Key, port: int, peers: Mapping[str, tuple[FabricNode, Sequence[str]]]) -> None:
    """Have the device hold `key` and exactly `peers`, each with the networks that are led to it; sessions go on.

    Raises RuntimeFailed.
    """
    lines = ["[Interface]", f"PrivateKey = {key.private}", f"ListenPort = {port}"]
    for _, (node, networks) in sorted(peers.items()):
        lines += [
            "[Peer]",
            f"PublicKey = {node.public_key}",
            f"Endpoint = {node.endpoint}:{node.wireguard_port}",
            f"AllowedIPs = {', '.join(networks)}",
            f"PersistentKeepalive = {KEEPALIVE_S}",
        ]
    _run(["wg", "syncconf", name, "/dev/stdin"], text="\n".join([*lines, ""]))


def _run(command: Sequence[str], *, text: str = "", environment: Mapping[str, str] | None = None, heard: bool = True) -> None:
    try:
        done = subprocess.run(
            command,
            start_new_session=not heard,
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if heard else subprocess.DEVNULL,
            timeout=COMMAND_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeFailed(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        words = (done.stderr or b"").decode(errors="replace").strip()[:300]
        raise RuntimeFailed(f"{command[0]}: {words or f'ended with {done.returncode}'}")
