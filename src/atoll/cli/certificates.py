"""`atoll certificates`: what the ingress shows for which hostname. A key is read from a file and never stands in an argument."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid, NotFound

if TYPE_CHECKING:
    from atoll.model.certificates import CertificateView

FILE_BYTES_MAX = 1 << 20
SOURCES = ("file", "own", "acme")
_FILE = click.Path(path_type=Path)


@group(
    example="atoll certificates add www.example.com --cert fullchain.pem --key privkey.pem\n"
    "atoll certificates add www.example.com --acme\natoll certificates"
)
def certificates() -> None:
    """Serve hostnames over TLS: certificates from files, the cell's own, or ACME."""


@command(
    example="atoll certificates add www.example.com --cert fullchain.pem --key privkey.pem\n"
    "atoll certificates add '*.example.com' --cert wild.pem --key wild.key\n"
    "atoll certificates add hello.localhost --own\natoll certificates add www.example.com --acme",
    fields={"chain": "cert", "source": ("own", "acme")},
)
@click.argument("host", metavar="HOST")
@click.option("--cert", type=_FILE, help="The chain in PEM, the hostname's own certificate first.")
@click.option("--key", type=_FILE, help="Its private key in PEM.")
@click.option("--own", is_flag=True, help="Have the cell's own root sign; see `atoll certificates ca`.")
@click.option("--acme", is_flag=True, help="Have the ACME authority sign; see `atoll certificates acme`.")
@click.option("--shared", is_flag=True, help="Show it for hostnames of other projects, too.")
async def add(session: Session, host: str, cert: Path | None, key: Path | None, own: bool, acme: bool, shared: bool) -> None:
    """Add or replace the certificate of a hostname; ingresses show it at once, and no connection is dropped."""
    from rich.markup import escape

    from atoll.model.certificates import CertificateRequest
    from atoll.model.records.certificate import CertificateSource

    if own + acme + (cert is not None or key is not None) != 1:
        raise click.UsageError("give --cert and --key, or --own, or --acme")
    source = CertificateSource.OWN if own else CertificateSource.ACME if acme else CertificateSource.FILE
    chain = secret = ""
    if source is CertificateSource.FILE:
        if cert is None or key is None:
            raise click.UsageError("--cert and --key go together")
        chain, secret = _read(cert, "cert"), _read(key, "key")
    wish = CertificateRequest(source=source, chain=chain, key=secret, shared=shared)
    async with session.client() as client:
        view = await client.put_certificate(session.project, host.lower(), wish)
    if session.json:
        session.output.json(view)
    elif source is CertificateSource.FILE:
        session.output.say(
            f"[green]✓[/] {view.host} shows a certificate of {escape(view.issuer)}, good until {_date(view.not_after)}"
        )
    else:
        session.output.say(f"[green]✓[/] {view.host} is to be signed; `atoll certificates show {view.host}` says how it stands")


def _read(file: Path, field: str) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise Invalid(f"--{field}: {file} is no PEM file: it is over 1 MiB", field=field)
        return data.decode("ascii")
    except FileNotFoundError:
        raise NotFound(f"--{field}: there is no {file}", field=field) from None
    except OSError as error:
        raise Invalid(f"--{field}: {file}: {error.strerror}", field=field) from None
    except UnicodeDecodeError:
        mend = "convert it: openssl x509 -inform der -in FILE, or openssl pkcs12 -nodes -in FILE"
        raise Invalid(f"--{field}: {file} is not PEM", field=field, mend=mend) from None


@command(name="list", example="atoll certificates list")
async def list_certificates(session: Session) -> None:
    """List the certificates of the project: where each is from, how it stands, and the last error."""
    async with session.client() as client:
        views = await client.certificates(session.project)
    if session.json:
        session.output.json(views)
        return
    rows = [
        (view.host, view.source, _state(view), _date(view.not_after), _date(view.renew_at), view.error or _whose(view))
        for view in views
    ]
    columns = ("HOST", "SOURCE", "STATE", "ENDS?", "RENEWAL?", "NOTE")
    session.output.table(columns, rows, empty=f"no certificates in project '{session.project}'")


@command(example="atoll certificates show www.example.com\natoll certificates show www.example.com --chain > chain.pem")
@click.argument("host", metavar="HOST")
@click.option("--chain", is_flag=True, help="Print the chain in PEM, and nothing else.")
async def show(session: Session, host: str, chain: bool) -> None:
    """Show one certificate: what it says, how its signing stands, and the last error."""
    from rich.markup import escape

    async with session.client() as client:
        view = await client.certificate(session.project, host.lower())
    if session.json:
        session.output.json(view)
        return
    if chain:
        click.echo(view.chain, nl=False)
        return
    session.output.say(f"{view.host}: source {view.source}, {_state(view)}" + (f" ({_whose(view)})" if _whose(view) else ""))
    if view.fingerprint:
        session.output.say(f"  names        {', '.join(view.names)}")
        session.output.say(f"  issuer       {escape(view.issuer)}")
        session.output.say(f"  fingerprint  sha256:{view.fingerprint}")
        session.output.say(f"  good         from {_date(view.not_before)} until {_date(view.not_after)}")
    if view.renew_at:
        session.output.say(f"  renewal      {_date(view.renew_at)}")
    if view.error:
        session.output.say(f"  last error   {escape(view.error)}")
    if view.retry_at:
        session.output.say(f"  next try     {_date(view.retry_at)}")


@command(example="atoll certificates remove www.example.com")
@click.argument("host", metavar="HOST")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
async def remove(session: Session, host: str, yes: bool) -> None:
    """Forget a certificate: new connections to this hostname over TLS are refused then."""
    from atoll.cli.apps import confirm

    if not yes:
        confirm(f"Forget the certificate of '{host}'?")
    async with session.client() as client:
        await client.remove_certificate(session.project, host.lower())
    if session.json:
        session.output.json({"removed": host.lower()})
    else:
        session.output.say(f"[green]✓[/] the certificate of {host.lower()} is forgotten")


@command(example="atoll certificates ca > atoll-root.pem\ncurl --cacert atoll-root.pem https://hello.localhost:8443/")
async def ca(session: Session) -> None:
    """Print the root that signs hostnames for this cell (source `own`): browsers show no warning once they trust it."""
    async with session.client() as client:
        view = await client.certificate_root()
    if session.json:
        session.output.json(view)
    else:
        click.echo(view.certificate, nl=False)


@command(
    example="atoll certificates acme --directory https://acme-v02.api.letsencrypt.org/directory --contact ops@example.com\n"
    "atoll certificates acme --directory https://ca.example/acme --eab-kid KID --eab-key-file key.txt\natoll certificates acme",
    fields={"ca": "directory_ca", "eab_key": "eab_key_file"},
)
@click.option("--directory", metavar="URL", help="The authority's directory. Who gives it agrees to the authority's terms.")
@click.option("--contact", multiple=True, metavar="MAIL", help="Whom the authority writes to. May be repeated.")
@click.option("--directory-ca", type=_FILE, help="What the directory's own certificate is known by; else the system's authorities.")
@click.option("--eab-kid", metavar="ID", help="External account binding: the key's id.")
@click.option("--eab-key-file", type=_FILE, help="External account binding: a file with the key, as the authority hands it out.")
@click.option("--forget", is_flag=True, help="Have no authority any more; what it has signed stays until it ends.")
async def acme(
    session: Session,
    directory: str | None,
    contact: tuple[str, ...],
    directory_ca: Path | None,
    eab_kid: str | None,
    eab_key_file: Path | None,
    forget: bool,
) -> None:
    """Choose the ACME authority that signs hostnames, or show which it is."""
    from atoll.model.certificates import AcmeRequest

    if directory is None and (contact or directory_ca or eab_kid or eab_key_file):
        raise click.UsageError("--directory: of which authority?")
    async with session.client() as client:
        if forget:
            await client.forget_acme()
        elif directory is not None:
            wish = AcmeRequest(
                directory=directory,
                contact=contact,
                ca=_read(directory_ca, "directory-ca") if directory_ca is not None else "",
                eab_kid=eab_kid or "",
                eab_key=_read(eab_key_file, "eab-key-file").strip() if eab_key_file is not None else "",
            )
            await client.set_acme(wish)
        view = await client.acme()
    if session.json:
        session.output.json(view)
    elif not view.directory:
        session.output.say("no ACME authority is chosen: atoll certificates acme --directory URL")
    else:
        session.output.say(f"{view.directory}, contact {', '.join(view.contact) or 'none'}")


def _state(view: CertificateView) -> str:
    if view.not_after is not None and view.not_after <= datetime.datetime.now(datetime.UTC).timestamp():
        return "expired"
    if view.state == "valid" or view.not_after is None:
        return str(view.state)
    return f"valid, renewal {view.state}"


def _whose(view: CertificateView) -> str:
    return f"asked for by app {view.app}" if view.app else "shared" if view.shared else ""


def _date(at: float | None) -> str:
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M} UTC" if at else "–"


for _each in (add, list_certificates, show, remove, ca, acme):
    certificates.add_command(_each)
