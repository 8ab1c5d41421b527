"""What each process is told when it starts. Tokens travel in files of mode 0600, never in arguments."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from atoll.model.errors import Invalid
from atoll.model.labels import check_taints, read_label
from atoll.store.place import SQLITE, Place, place_of

DATA_DEFAULT = Path("/var/lib/atoll")
API_DEFAULT = "127.0.0.1:7600"
INGRESS_DEFAULT = "127.0.0.1:8080"
TLS_PORT_APART = 443 - 80
"""How far the ingress's port for TLS is from the plain one, where nothing else is said: 443 beside 80, 8443 beside 8080."""
SUBNET_FORMER = "10.64.0.0/16"
"""What every node had before cells gave prefixes; a node whose instances still run keeps it."""
DOMAIN_DEFAULT = "localhost"
EXIT_HOPELESS = 78
"""EX_CONFIG of sysexits.h: the supervisor does not start such a process again, but ends."""


@dataclass(frozen=True)
class Config:
    """One machine's settings; `entry/up.py` passes them on to its children unchanged."""

    data: Path = DATA_DEFAULT
    api: str = API_DEFAULT
    ingress: str = INGRESS_DEFAULT
    ingress_tls_port: str = ""
    """Where the ingress speaks TLS, at the same address: a port, or `off`; see `TLS_PORT_APART`."""
    otlp: str = ""
    """The OpenTelemetry collector that the ingress sends traces to, by OTLP over HTTP; empty for none."""
    trace_percent: float = 100.0
    """Of the requests that bring no decision with them."""
    subnet: str = ""
    """Of this node's instances; empty for the prefix that the cell gives."""
    fabric_address: str = ""
    """The IPv4 address by which other nodes reach this one; empty for the one towards the servers."""
    no_ipv6: bool = False
    """Instances of this node have no IPv6."""
    ipv6_address: str = ""
    """The address of this machine by which instances reach the world by IPv6; empty for a global one, where there is one."""
    domain: str = DOMAIN_DEFAULT
    node: str = ""
    site: str = "local"
    region: str = "local"
    labels: tuple[str, ...] = ()
    """Of this node: `KEY=VALUE` each."""
    taints: tuple[str, ...] = ()
    """Of this node: `KEY[=VALUE][:EFFECT]` each."""
    default_registry: str = ""
    registry_auth: Path | None = None
    """A file with what private registries are shown, as `docker login` writes it."""
    nvproxy_driver: str = ""
    """The driver version that gVisor shall take the node's NVIDIA driver for; at the operator's own risk."""
    prometheus: str = ""
    """Prometheus servers that apps may be scaled by: `HOST:PORT`, by commas; no other is asked."""
    cdi_devices: str = ""
    """Kinds of CDI devices that may be asked for: `vendor.com/class`, with `:shared` where any number may have one; by commas."""
    log_json: bool = False
    store: str = ""
    """`etcd://HOST:PORT,…` or `sqlite:PATH`; without it ATOLL_STORE, and then a file in the data directory. No secrets in it."""
    store_ca: Path | None = None
    store_cert: Path | None = None
    store_key: Path | None = None
    listen: str = ""
    """Where the server listens, if elsewhere than `api`."""
    tls: bool = False
    insecure_plain: bool = False
    """Plain HTTP where others than this machine may come: whoever is on the way reads and changes everything."""
    advertise: str = ""
    """The URL by which other machines reach this server."""
    key: Path | None = None
    """The cell's key, the same at every server; without it `server/key` in the data directory."""
    certificate_life: str = "24h"
    server: str = ""
    """URLs of the cell's servers, with commas, for an agent or ingress of another machine."""
    ca: str = ""
    """Their authority, as `--ca` takes it."""

    @property
    def tls_port(self) -> int | None:
        """Return the port at which the ingress speaks TLS, None for nowhere. Raises Invalid."""
        text, plain = self.ingress_tls_port, split_address(self.ingress, field="--ingress")[1]
        if text == "off":
            return None
        if not text:
            return plain + TLS_PORT_APART if 0 < plain <= 65_535 - TLS_PORT_APART else None
        if not text.isdigit() or not 1 <= int(text) <= 65_535 or int(text) == plain:
            mend = "give a port other than the plain one, or 'off'"
            raise Invalid(f"--ingress-tls-port: {text[:20]!r} is not a port for TLS", field="ingress-tls-port", mend=mend)
        return int(text)

    @property
    def listens(self) -> str:
        return self.listen or self.api

    @property
    def secure(self) -> bool:
        """Whether the server speaks TLS: when it is told, and where others than this machine may come. Raises Invalid."""
        return self.tls or not (self.insecure_plain or is_loopback(split_address(self.listens, field="--listen")[0]))

    @property
    def url(self) -> str:
        """Return where processes of this machine find the server."""
        return f"{'https' if self.secure else 'http'}://{self.listens}"

    @property
    def advertised(self) -> str:
        """Return where other machines find the server."""
        if self.advertise:
            return self.advertise.rstrip("/")
        host, port = split_address(self.listens, field="--listen")
        if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            host = socket.getfqdn()
        return f"{'https' if self.secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def key_file(self) -> Path:
        return self.key or self.server_data / "key"

    @property
    def ca_file(self) -> Path:
        """What processes of this machine know the server by."""
        return self.server_data / "ca.pem"

    @property
    def node_name(self) -> str:
        return self.node or node_name_of(socket.gethostname())

    @property
    def node_labels(self) -> dict[str, str]:
        """Raises Invalid."""
        return dict(read_label(text, "--label") for text in self.labels)

    @property
    def node_taints(self) -> tuple[str, ...]:
        """Raises Invalid."""
        return check_taints(self.taints, "--taint")

    @property
    def server_data(self) -> Path:
        return self.data / "server"

    @property
    def store_place(self) -> Place:
        """Where the cell's state lies. Certificates, user and password may come from the environment. Raises Invalid."""
        text = self.store or os.environ.get("ATOLL_STORE") or f"{SQLITE}{self.server_data / 'state.db'}"
        return place_of(text, os.environ, ca=self.store_ca, cert=self.store_cert, key=self.store_key)

    @property
    def agent_data(self) -> Path:
        return self.data / "agent"

    @property
    def ingress_data(self) -> Path:
        return self.data / "ingress"

    @property
    def client_file(self) -> Path:
        return self.data / "client.json"

    def arguments(self) -> list[str]:
        """Return the options that give another process the same settings."""
        options = [
            f"--data={self.data}",
            f"--api={self.api}",
            f"--ingress={self.ingress}",
            f"--domain={self.domain}",
            f"--site={self.site}",
            f"--region={self.region}",
        ]
        if self.node:  # a machine that joins may get its name by its token
            options.append(f"--node={self.node}")
        options += [f"--label={text}" for text in self.labels] + [f"--taint={text}" for text in self.taints]
        if self.default_registry:
            options.append(f"--default-registry={self.default_registry}")
        if self.nvproxy_driver:
            options.append(f"--nvproxy-driver={self.nvproxy_driver}")
        if self.prometheus:
            options.append(f"--prometheus={self.prometheus}")
        if self.cdi_devices:
            options.append(f"--cdi-devices={self.cdi_devices}")
        if self.otlp:
            options += [f"--otlp={self.otlp}", f"--trace-percent={self.trace_percent:g}"]
        if self.log_json:
            options.append("--log-json")
        given: dict[str, object] = {
            "store": self.store,
            "store-ca": self.store_ca,
            "store-cert": self.store_cert,
            "store-key": self.store_key,
            "registry-auth": self.registry_auth,
        }
        given |= {"subnet": self.subnet, "fabric-address": self.fabric_address, "ipv6-address": self.ipv6_address}
        given |= {"listen": self.listen, "advertise": self.advertise, "key": self.key, "server": self.server, "ca": self.ca}
        given |= {"ingress-tls-port": self.ingress_tls_port}
        given |= {"certificate-life": self.certificate_life if self.certificate_life != Config.certificate_life else ""}
        options += [f"--{name}={value}" for name, value in given.items() if value]
        options += [
            f"--{name}"
            for name, on in {"tls": self.tls, "insecure-plain": self.insecure_plain, "no-ipv6": self.no_ipv6}.items()
            if on
        ]
        return options


def node_name_of(hostname: str) -> str:
    """Return a machine's hostname as a name that Atoll accepts."""
    kept = "".join(c if c.isalnum() else "-" for c in hostname.lower().split(".")[0]).strip("-")
    return ("n-" + kept if not kept[:1].isalpha() else kept)[:40].rstrip("-") or "node"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_address(address: str, *, field: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`. Raises Invalid, naming the option."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65_535:
        raise Invalid(f"{field}: {address!r} is not HOST:PORT", field=field, mend="write e.g. 127.0.0.1:7600")
    return host.strip("[]"), int(port)
