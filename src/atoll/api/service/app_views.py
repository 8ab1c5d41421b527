"""An app as its users see it: how it stands, where it answers, and what ingresses leave out of that."""

from __future__ import annotations

from atoll.api.service import claims
from atoll.api.service.context import Context
from atoll.api.service.ingress_heartbeats import IngressHeartbeats
from atoll.model.certificates import provable
from atoll.model.records import App, AppStatus, Ingress
from atoll.model.records.certificate import CertificateStatus
from atoll.model.spec import AppSpec, Issuer
from atoll.model.views import AppView
from atoll.store.cache import Held


class AppViews:
    """Without `ingresses`, nothing is told of what those leave out."""

    def __init__(self, context: Context, ingresses: IngressHeartbeats | None = None) -> None:
        self._context = context
        self._state = context.state
        self._ingresses = ingresses

    def of(self, held: Held[App]) -> AppView:
        app = held.record
        refused = self._ingresses.refused(app.project, app.name) if self._ingresses is not None else {}
        return AppView(app=app, status=self.status(app), revision=held.revision, urls=self._urls(app), refused=refused)

    def status(self, app: App) -> AppStatus | None:
        held = self._state.get(AppStatus, f"{app.project}/{app.name}")
        return held.record if held is not None else None

    def _urls(self, app: App) -> tuple[str, ...]:
        ingress = min(self._state.records(Ingress).items(), default=None)
        if ingress is None:
            return ()
        known = ingress[1].record
        hosts = [host for host in claims.hosts_of(app.spec, self._context.domain) if not host.host.startswith("*")]
        return tuple(url for host in hosts for url in self._urls_of(app.spec, host, known))

    def _urls_of(self, spec: AppSpec, host: claims.Host, ingress: Ingress) -> list[str]:
        """Return where the app answers at one place: with TLS, too, where it asks for a certificate, and first once it has it."""
        plain = _url("http", host, ingress.http_port, 80)
        rules = spec.ingress
        if not ingress.https_port or rules is None or not (rules.https_only or rules.certificate is not None):
            return [plain]
        secure = _url("https", host, ingress.https_port, 443)
        if rules.https_only:
            return [secure]
        if rules.certificate is Issuer.ACME and not provable(host.host):
            return [plain]
        status = self._state.get(CertificateStatus, host.host)
        signed = status is not None and status.record.project == spec.project and bool(status.record.chain)
        return [secure, plain] if signed else [plain, secure]


def _url(scheme: str, host: claims.Host, port: int, usual: int) -> str:
    return f"{scheme}://{host.host}{'' if port == usual else f':{port}'}{host.path}"
