"""Which hostnames are to have a certificate, and who signs each: what users have added, and what apps ask for. Pure."""

from __future__ import annotations

from msgspec import Struct

from atoll.model.certificates import provable, too_wide, wildcard_of, wildcards_over
from atoll.model.records import App, RouteClaim
from atoll.model.records.certificate import Certificate, CertificateSource, CertificateStatus
from atoll.model.spec import Issuer
from atoll.store.cache import State


class Wish(Struct, frozen=True, kw_only=True):
    """A hostname that is to have a certificate. `app` is empty where a `Certificate` says so."""

    host: str
    project: str
    source: CertificateSource
    app: str = ""


def wishes_of(state: State) -> dict[str, Wish]:
    """Return hostname → wish. What a user has added goes before what an app asks for, but not for another project's hostname."""
    found: dict[str, Wish] = {}
    for issuer in Issuer:
        source = CertificateSource(issuer.value)
        for key, app in state.found(App, issuer_of, issuer).items():
            if app.record.deleting:
                continue
            for place in state.found(RouteClaim, app_of, key):
                host = place.partition("/")[0]
                if ":" not in host and _asked_for(state, host, app.record, source):
                    found[host] = Wish(host=host, project=app.record.project, source=source, app=app.record.name)
    for host, held in state.records(Certificate).items():
        if not held.record.shared and _answering(state, host) not in (None, held.record.project):
            continue
        found[host] = Wish(host=host, project=held.record.project, source=held.record.source)
    return found


def _asked_for(state: State, host: str, app: App, source: CertificateSource) -> bool:
    """Whether an app's hostname can have one from that source, and has none of a wildcard; one that it has by now is kept."""
    if source is CertificateSource.ACME and not provable(host):
        return False
    wildcard = wildcard_of(host)
    wild = state.get(Certificate, wildcard)
    if wild is None or too_wide(wildcard) or not (wild.record.shared or wild.record.project == app.project):
        return True
    status = state.get(CertificateStatus, host)
    return (
        status is not None and (status.record.project, status.record.app) == (app.project, app.name) and bool(status.record.chain)
    )


def _answering(state: State, host: str) -> str | None:
    """Return the project whose app answers at `host`, as the ingress sees it; None where there is none."""
    for name in (host, *wildcards_over(host)):
        claims = state.found(RouteClaim, of_host, name)
        if claims:
            return claims[min(claims)].record.project
    return None


def issuer_of(key: str, record: App) -> Issuer | None:
    """Apps by who signs for them."""
    return record.spec.ingress.certificate if record.spec.ingress is not None else None


def app_of(key: str, record: RouteClaim) -> str:
    """Claims by their app."""
    return f"{record.project}/{record.app}"


def of_host(key: str, record: RouteClaim) -> str:
    """Claims by their hostname."""
    return key.partition("/")[0]
