"""Certificates of hostnames: what users add, see and take away. Keys go in and are sealed at once; none comes out here."""

from __future__ import annotations

import datetime

from msgspec.structs import replace

from atoll.api.service.access import EVERY_PROJECT, Caller
from atoll.api.service.claims import DEFAULT_PROJECT, answering, of_host
from atoll.api.service.context import Context, Draft, RequestKey, check_match
from atoll.api.service.projects import require_project
from atoll.model import codec, keys
from atoll.model.certificates import (
    CERTIFICATES_MAX,
    CertificateRequest,
    CertificateView,
    check_host,
    too_wide,
    wildcard_of,
)
from atoll.model.chains import Described, check_chain, describe
from atoll.model.errors import Conflict, Exhausted, Forbidden, Invalid, NotFound
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import Project, RouteClaim
from atoll.model.records.certificate import AcmeSettings, Certificate, CertificatePhase, CertificateSource, CertificateStatus
from atoll.model.views import Page
from atoll.store.cache import Held


class Certificates:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state
        self._described: dict[str, tuple[str, Described]] = {}
        """Host → the chain that was looked at, and what it says: reading one takes 0.1 ms, and a list has thousands."""

    def all(self, project: str, *, limit: int, after: str = "") -> Page[CertificateView]:
        """Return the certificates that the project added or that its apps ask for, by hostname, without their chains."""
        require_project(self._context, project)
        hosts = {*self._state.found(Certificate, of_project, project), *self._state.found(CertificateStatus, of_project, project)}
        names = sorted(host for host in hosts if host > after)
        views = (self._view(project, host) for host in names[:limit])
        items = tuple(view for view in views if view is not None)
        return Page(items=items, revision=self._state.revision, next=names[limit - 1] if len(names) > limit else None)

    def get(self, project: str, host: str) -> CertificateView:
        """Return one, with its chain. Raises NotFound."""
        require_project(self._context, project)
        view = self._view(project, host, chain=True)
        if view is None:
            raise NotFound(f"no certificate for {host[:80]} in project '{project}'", mend="'atoll certificates' lists them")
        return view

    async def put(
        self,
        caller: Caller,
        project: str,
        host: str,
        wish: CertificateRequest,
        *,
        if_match: int | None = None,
        request: RequestKey | None = None,
    ) -> CertificateView:
        """Add or replace the certificate of a hostname; ingresses show it within moments. Safe to repeat.

        It takes the place of another project's only where this project's apps answer and that one's do not. Raises Invalid for one
        that no ingress could show for this hostname, naming `chain` or `key`; Conflict and Forbidden for a hostname that is
        another project's, Exhausted.
        """
        check_host(host)
        if too_wide(host):
            mend = f"name each hostname, or a wildcard with two labels, e.g. *.example.{host.removeprefix('*.')}"
            raise Invalid(f"host: clients take no certificate for {host}, a wildcard over a single label", field="host", mend=mend)
        chain, key, not_after = "", b"", 0.0
        if wish.source is CertificateSource.FILE:
            checked = check_chain(host, wish.chain, wish.key, self._context.clock.now())
            chain, key, not_after = checked.chain, checked.key.encode(), checked.described.not_after
        elif wish.chain or wish.key:
            raise Invalid(f"chain: source '{wish.source}' takes none", field="chain", mend="leave chain and key out")
        elif wish.source is CertificateSource.ACME and host.startswith("*."):
            mend = "name each hostname, or add a wildcard's certificate from files"
            raise Invalid("host: ACME over HTTP proves no wildcard", field="host", mend=mend)

        def build() -> Draft[CertificateView]:
            require_project(self._context, project)
            held = self._state.get(Certificate, host)
            self._check_owner(caller, project, host, held, shared=wish.shared)
            if wish.source is CertificateSource.ACME:
                self._check_acme()
            own = held if held is not None and held.record.project == project else None
            check_match(own, if_match, f"the certificate of {host}")
            if held is None and len(self._state.records(Certificate)) >= CERTIFICATES_MAX:
                raise Exhausted(
                    f"there are {CERTIFICATES_MAX} certificates already", mend="remove those of hostnames that are gone"
                )
            # What was handed in before is shown until what is wanted in its place has been signed; never by another project.
            before = own.record if own is not None and not key else None
            record = Certificate(
                host=host,
                project=project,
                source=wish.source,
                chain=chain if before is None else before.chain,
                sealed=before.sealed
                if before is not None
                else self._context.sealer.seal(key, keys.certificate(host))
                if key
                else b"",
                not_after=not_after if before is None else before.not_after,
                shared=wish.shared,
                version=1 + (held.record.version if held is not None else 0),
                updated_at=self._context.clock.now(),
            )
            place = keys.certificate(host)
            return Draft(
                compare=[absent(place) if held is None else unchanged(place, held.revision)],
                ops=[Put(place, codec.encode(record))],
                answer=lambda revision: self._of(host, Held(record, revision, revision), self._state.get(CertificateStatus, host)),
            )

        return await self._context.write(CertificateView, build, request)

    async def remove(self, project: str, host: str, *, request: RequestKey | None = None) -> CertificateView:
        """Forget a certificate that was added; it is shown no more. Raises NotFound, Conflict for one that an app asks for."""

        def build() -> Draft[CertificateView]:
            held = self._state.get(Certificate, host)
            if held is None or held.record.project != project:
                view = self.get(project, host)
                raise Conflict(
                    f"app '{view.app}' asks for the certificate of {host}", mend="take it out of the app's [ingress] table"
                )
            view = self._of(host, held, None)
            place = keys.certificate(host)
            return Draft(compare=[unchanged(place, held.revision)], ops=[Delete(place)], answer=lambda _: view)

        return await self._context.write(CertificateView, build, request)

    def _check_owner(self, caller: Caller, project: str, host: str, held: Held[Certificate] | None, *, shared: bool) -> None:
        if shared and caller.project != EVERY_PROJECT:
            mend = "use a token for all projects, or leave shared out"
            raise Forbidden("shared: this token is for one project", field="shared", mend=mend)
        holders = self._holders(host)
        if held is not None and held.record.project != project:
            # Added before the hostname was this project's: it is not shown here, and must not stand in the way.
            replaceable = project in holders and held.record.project not in holders and not held.record.shared
            if not replaceable:
                raise self._taken(caller, held.record.project, f"the certificate of {host}")
        self._check_domain(project, host)
        if shared:
            return
        for owner, name in holders.items():
            if owner != project:
                raise self._taken(caller, owner, name)

    def _holders(self, host: str) -> dict[str, str]:
        """Return project → hostname, of those whose apps answer where the certificate would be shown."""
        first = answering(self._context, host)
        found = dict([first] if first is not None else [])
        if host.startswith("*."):
            for place, claim in self._state.found(RouteClaim, of_parent, host.removeprefix("*.")).items():
                found.setdefault(claim.record.project, place.partition("/")[0])
        return found

    def _check_domain(self, project: str, host: str) -> None:
        """Under the cell's own domain each project has its part, as routes have."""
        domain = self._context.domain
        if host != domain and not host.endswith("." + domain):
            return
        labels = host.count(".") - domain.count(".")
        owner = host.removesuffix("." + domain).rsplit(".", 1)[-1]
        if project == DEFAULT_PROJECT:
            taken = labels > 1 and self._state.get(Project, owner) is not None
        else:
            taken = labels < 2 or owner != project
        if taken:
            mend = f"use a name under {project}.{domain}, or a domain of your own"
            raise Forbidden(f"host: {host} is not under this project's part of {domain}", field="host", mend=mend)

    def _taken(self, caller: Caller, owner: str, what: str) -> Conflict:
        whose = f"project '{owner}'" if caller.sees(owner) else "another project"
        return Conflict(f"host: {what} belongs to {whose}", field="host", mend="choose another hostname")

    def _check_acme(self) -> None:
        if self._state.get(AcmeSettings, "cell") is None:
            mend = "an admin names it: atoll certificates acme --directory URL"
            raise Invalid("source: no ACME authority is chosen for this cell", field="source", mend=mend)

    def _view(self, project: str, host: str, *, chain: bool = False) -> CertificateView | None:
        held = self._state.get(Certificate, host)
        status = self._state.get(CertificateStatus, host)
        if held is not None and held.record.project != project:
            held = None
        if status is not None and status.record.project != project:
            status = None
        if held is None and (status is None or not status.record.app):
            return None  # nobody asks for it: there is at most a wait, kept for when somebody does
        return self._of(host, held, status, chain=chain)

    def _of(
        self,
        host: str,
        held: Held[Certificate] | None,
        status: Held[CertificateStatus] | None,
        *,
        chain: bool = False,
    ) -> CertificateView:
        wanted, told = held.record if held is not None else None, status.record if status is not None else None
        if wanted is not None and told is not None and told.source is not wanted.source:
            # Of what it was before: how that stood means nothing any more, but it is still shown.
            waits = wanted.source is CertificateSource.ACME and told.attempts
            retry_at = told.retry_at if waits else 0.0
            told = replace(told, phase=CertificatePhase.WAITING, error="", retry_at=retry_at, renew_at=0.0)
        source = wanted.source if wanted is not None else told.source if told is not None else CertificateSource.FILE
        shown = told.chain if told is not None and source is not CertificateSource.FILE else ""
        if not shown and wanted is not None:
            shown = wanted.chain
        described = self._describe(host, shown) if shown else None
        signed = told is not None and source is not CertificateSource.FILE
        phase = told.phase if told is not None and signed else CertificatePhase.WAITING
        return CertificateView(
            host=host,
            project=wanted.project if wanted is not None else told.project if told is not None else "",
            source=source,
            state=CertificatePhase.VALID if source is CertificateSource.FILE else phase,
            app=told.app if told is not None and wanted is None else "",
            shared=wanted.shared if wanted is not None else False,
            names=described.names if described is not None else (),
            issuer=described.issuer if described is not None else "",
            fingerprint=described.fingerprint if described is not None else "",
            not_before=described.not_before if described is not None else None,
            not_after=described.not_after if described is not None else None,
            renew_at=told.renew_at or None if told is not None and signed else None,
            retry_at=told.retry_at or None if told is not None and signed and phase is not CertificatePhase.VALID else None,
            error=self._words(described, told.error if told is not None and signed else ""),
            chain=shown if chain else "",
            revision=held.revision if held is not None else status.revision if status is not None else 0,
        )

    def _words(self, described: Described | None, error: str) -> str:
        """Return what is wrong: the last attempt's error, else that what is shown has expired."""
        if error or described is None or described.not_after > self._context.clock.now():
            return error
        return f"expired on {datetime.datetime.fromtimestamp(described.not_after, datetime.UTC):%Y-%m-%d %H:%M UTC}"

    def _describe(self, host: str, chain: str) -> Described:
        known = self._described.get(host)
        if known is None or known[0] != chain:
            if len(self._described) > CERTIFICATES_MAX:
                self._described.clear()
            known = self._described[host] = (chain, describe(chain))
        return known[1]


def of_project(key: str, record: Certificate | CertificateStatus) -> str:
    return record.project


def of_parent(key: str, record: RouteClaim) -> str:
    """Claims by what a wildcard above their hostname stands for."""
    return wildcard_of(of_host(key, record)).removeprefix("*.")
