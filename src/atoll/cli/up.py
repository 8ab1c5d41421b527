"""`atoll up`, `down`, and the three processes alone. The work is done in `entry/`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command
from atoll.model.errors import AtollError

if TYPE_CHECKING:
    from atoll.entry.config import Config

ANNOUNCE_S = 60.0
"""How long the foreground's announcement waits for everything to serve."""
ANNOUNCE_POLL_S = 0.1


TLS_OPTIONS = (
    click.option("--store-ca", type=click.Path(path_type=Path), help="etcd: the CA of its members; turns on TLS."),
    click.option("--store-cert", type=click.Path(path_type=Path), help="etcd: the certificate that we show."),
    click.option("--store-key", type=click.Path(path_type=Path), help="etcd: that certificate's key."),
)
"""A user of etcd comes from ATOLL_STORE_USER and ATOLL_STORE_PASSWORD_FILE (or ATOLL_STORE_PASSWORD), never from an argument."""


data_option = click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="ATOLL_DATA",
    help="The data directory; else ATOLL_DATA.  [default: /var/lib/atoll]",
)


def settings(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every Atoll process takes."""
    options = (
        data_option,
        click.option("--ingress", metavar="HOST:PORT", help="Where apps are served.  [default: 127.0.0.1:8080]"),
        click.option(
            "--ingress-tls-port",
            metavar="PORT|off",
            help="Where apps are served over TLS.  [default: 443 beside 80, 8443 beside 8080, and so on]",
        ),
        click.option("--otlp", metavar="URL", help="Where the ingress sends traces: an OpenTelemetry collector, OTLP over HTTP."),
        click.option(
            "--trace-percent",
            type=click.FloatRange(0, 100),
            help="How many of the requests are traced.  [default: 100]",
        ),
        click.option("--subnet", metavar="CIDR", help="Addresses of instances.  [default: what the cell gives, of 10.64.0.0/10]"),
        click.option("--fabric-address", metavar="IP", help="Where other nodes reach this one.  [default: towards the servers]"),
        click.option("--no-ipv6", is_flag=True, help="This node's instances have IPv4 only."),
        click.option(
            "--ipv6-address", metavar="IP", help="How the world sees instances by IPv6.  [default: this node's global one]"
        ),
        click.option("--domain", metavar="NAME", help="Apps are APP.NAME.  [default: localhost]"),
        click.option("--node", metavar="NAME", help="This node's name.  [default: the hostname]"),
        click.option("--site", metavar="NAME", help="Where this node stands.  [default: local]"),
        click.option("--region", metavar="NAME", help="The group of sites.  [default: local]"),
        click.option(
            "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of this node, for placement; may be repeated."
        ),
        click.option(
            "--taint",
            "taints",
            multiple=True,
            metavar="KEY[=VALUE][:EFFECT]",
            help="Keeps off this node what does not tolerate it; EFFECT is no-schedule or prefer-no-schedule. May be repeated.",
        ),
        click.option("--default-registry", metavar="HOST", help="Where images without a host come from."),
        click.option(
            "--registry-auth",
            type=click.Path(path_type=Path, exists=True, dir_okay=False, resolve_path=True),
            metavar="FILE",
            help="What this node shows to private registries: a file as docker, podman or skopeo login writes it.",
        ),
        click.option(
            "--prometheus",
            metavar="HOST:PORT,…",
            help="Prometheus servers that apps may scale by (scale.prometheus); the leading server asks no other.",
        ),
        click.option(
            "--cdi-devices",
            metavar="KIND,…",
            help="Devices of CDI specs that specs may ask for, e.g. vendor.com/class or vendor.com/class:shared.",
        ),
        click.option(
            "--nvproxy-driver",
            metavar="VERSION",
            help="NVIDIA driver that gVisor takes the node's for, where it does not know it; of the same series, at your own risk.",
        ),
        click.option("--log-json", is_flag=True, help="Log as JSON."),
        click.option("--store", metavar="PLACE", help="etcd://HOST:PORT,… or sqlite:PATH.  [default: a file in --data]"),
        *TLS_OPTIONS,
    )
    for option in reversed(options):
        function = option(function)
    return function


def _extra(*options: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


serving_options = _extra(
    click.option("--listen", metavar="HOST:PORT", help="Where the API listens.  [default: that of --api]"),
    click.option("--tls", is_flag=True, help="Speak TLS also on loopback; elsewhere it is always spoken."),
    click.option("--insecure-plain", is_flag=True, help="Speak plain HTTP although others than this machine may come."),
    click.option("--advertise", metavar="URL", help="Where other machines reach this server.  [default: from --listen]"),
    click.option(
        "--key", type=click.Path(path_type=Path), help="The cell's key, the same at every server.  [default: DATA/server/key]"
    ),
    click.option("--certificate-life", metavar="SPAN", help="How long certificates live that are signed here.  [default: 24h]"),
)
joining_options = _extra(
    click.option("--server", metavar="URL,…", help="The cell's servers, where this is another machine."),
    click.option("--join", metavar="TOKEN", help="Join the cell first, with a token of `atoll join-token create`."),
)


def _config(session: Session, given: dict[str, Any]) -> Config:
    """Return the settings; --api is where the API listens here, not where it is called."""
    from atoll.entry.config import Config

    if session.api_given is not None:
        given["api"] = session.api_given.removeprefix("http://").rstrip("/")
    if session.ca_given is not None:
        given["ca"] = str(Path(session.ca_given).absolute()) if Path(session.ca_given).exists() else session.ca_given
    for name in ("data", "key", "store_ca", "store_cert", "store_key"):
        if given.get(name) is not None:
            given[name] = given[name].absolute()
    return Config(**{name: value for name, value in given.items() if value})


@command(example="atoll up --detach\natoll up --data /srv/atoll --ingress 0.0.0.0:80 --domain apps.example")
@settings
@serving_options
@click.option("--detach", "-d", is_flag=True, help="Return when everything serves; it goes on in the background.")
def up(session: Session, detach: bool, **given: Any) -> None:
    """Run everything on this machine: server, agent and ingress, over one data directory.

    In the foreground with its log on stderr until Ctrl-C, which stops the instances too; or with --detach. Needs root.
    """
    config = _config(session, given)
    if detach:
        _detached(session, config)
        return
    from atoll.entry.preflight import check_settings, make_data
    from atoll.entry.up import check, check_root, foreground, lock, without_tls

    check_root()
    check_settings(config)
    make_data(config)
    with lock(config):
        check(config)
        plain = without_tls(config)
    if os.fork() == 0:
        _announce(session, config, plain)
    sys.exit(foreground(config))


def _detached(session: Session, config: Config) -> None:
    from atoll.entry.launch import launch
    from atoll.entry.up import without_tls

    plain = without_tls(config)
    began = time.monotonic()
    with session.output.err.status("starting") as status:
        pid = launch(config, progress=lambda waits: status.update(f"waiting for {waits}"))
    if session.json:
        session.output.json({**_places(config, plain), "pid": pid, "ready_s": round(time.monotonic() - began, 3)})
        return
    session.output.say(f"[green]✓[/] atoll runs, process {pid}, ready after {time.monotonic() - began:.1f} s")
    _show(session, config, plain)


def _announce(session: Session, config: Config, plain: str) -> None:
    """In a child of its own: say where everything is once it serves, and end. Never returns."""
    from atoll.entry.launch import missing

    code = 1
    try:
        deadline = time.monotonic() + ANNOUNCE_S
        while code and time.monotonic() < deadline and os.getppid() != 1:
            try:
                if asyncio.run(missing(config)) is None:
                    session.output.say("[green]✓[/] everything serves")
                    _show(session, config, plain)
                    code = 0
            except AtollError:
                pass  # not yet
            time.sleep(ANNOUNCE_POLL_S)
    finally:
        os._exit(code)


def _places(config: Config, plain: str = "") -> dict[str, str]:
    """Return where what is; `plain` is why the ingress does without TLS."""
    secure = config.tls_port is not None and not plain
    return {
        "api": config.url,
        "ingress": f"http://{config.ingress}",
        "ingress_tls": f"https://{config.ingress.rpartition(':')[0]}:{config.tls_port}" if secure else "",
        "domain": config.domain,
        "token_file": str(config.client_file),
        "data": str(config.data),
    }


def _show(session: Session, config: Config, plain: str = "") -> None:
    from rich.markup import escape
    from rich.table import Table

    from atoll.entry.config import DATA_DEFAULT

    places = _places(config, plain)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("api", escape(places["api"]))
    grid.add_row(
        "ingress", escape(f"{places['ingress']}  (apps at http://APP.{config.domain}:{config.ingress.rpartition(':')[2]})")
    )
    if places["ingress_tls"]:
        grid.add_row("", escape(f"{places['ingress_tls']}  (hostnames that have a certificate: `atoll certificates`)"))
    elif plain:
        grid.add_row("", f"[yellow]{escape(plain)}[/]")
    grid.add_row("token", escape(f"in {places['token_file']}"))
    if config.data != DATA_DEFAULT:
        grid.add_row("to use it", escape(f"export ATOLL_DATA={config.data}"))
    grid.add_row("next", "atoll deploy examples/hello")
    session.output.show(grid)


@command(example="atoll down\natoll down --keep-running   # the next `atoll up` takes the instances over")
@data_option
@click.option("--keep-running", is_flag=True, help="Leave the instances running.")
def down(session: Session, data: Path | None, keep_running: bool) -> None:
    """End an `atoll up`: ingress first, then the instances, then the rest."""
    from atoll.entry.launch import terminate

    config = _config(session, {"data": data})
    with session.output.err.status("stopping"):
        pid = terminate(config, keep_running=keep_running)
    if session.json:
        session.output.json({"stopped": pid})
    else:
        session.output.say(f"[green]✓[/] stopped, process {pid}" + ("; its instances go on" if keep_running else ""))
        session.output.say(f"  what is wanted and all data stay in {config.data}; `atoll up` brings it back")


def _process(role: str, text: str, example: str, options: Callable[[Callable[..., Any]], Callable[..., Any]]) -> click.Command:
    def start(session: Session, join: str | None = None, **given: Any) -> None:
        if join is not None:
            from atoll.entry.joining import JOIN_VARIABLE

            os.environ[JOIN_VARIABLE] = join  # it is a secret, and arguments are shown to everyone for as long as the process runs
        config = _config(session, given)
        os.execv(sys.executable, [sys.executable, "-m", f"atoll.entry.{role}", *config.arguments()])  # noqa: S606 - becomes it

    start.__name__ = role
    start.__doc__ = text
    return command(example=example, name=role)(settings(options(start)))


server = _process(
    "server",
    "Run a server alone: store, API, controllers and scheduler. Several over one etcd are one cell.",
    "atoll server --listen 0.0.0.0:7600 --store etcd://10.0.0.1,10.0.0.2,10.0.0.3 --key /etc/atoll/key",
    serving_options,
)
agent = _process(
    "agent",
    "Run the agent alone: it runs this node's instances. It joins once (--join), or its token is DATA/agent/token.",
    "atoll agent --server https://10.0.0.1:7600,https://10.0.0.2:7600 --join TOKEN",
    joining_options,
)
ingress = _process(
    "ingress",
    "Run the ingress alone. It joins once (--join), or its token is DATA/ingress/token.",
    "atoll ingress --ingress 0.0.0.0:80 --server https://10.0.0.1:7600 --join TOKEN",
    joining_options,
)
