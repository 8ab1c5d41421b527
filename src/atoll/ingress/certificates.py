"""The certificates that an ingress shows, by the name that a client says. No I/O: batches in, Envoy's secrets out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from envoy.extensions.transport_sockets.tls.v3 import secret_pb2

from atoll.ingress.resources import SHOWN, Kind, Name, Resource, resource, said
from atoll.model.certificates import CertificateBatch, Material, wildcard_of, wildcards_over


class CertificateTable(Mapping[str, Resource]):
    """Name that a client says → the secret that Envoy shows for it, if there is one: of that name, or of a wildcard above it.

    A certificate of one project is not shown for a hostname of another, unless it is shared. `project_of` says whose a hostname is;
    None for nobody's. As a mapping it lists the hosts of all certificates; it finds more than it lists.
    """

    def __init__(self, project_of: Callable[[str], str | None]) -> None:
        self._project_of = project_of
        self.shown: Resource | None = None
        """What instances are shown, which is no hostname's."""
        self._materials: dict[str, Material] = {}
        self.challenges: dict[str, dict[str, str]] = {}
        """Host → token → what is answered under it."""
        self.whole = False
        """Whether all certificates have been told."""
        self._below: Counter[str] = Counter()
        """Wildcard → how many certificates are there for names below it, at any depth."""

    def __getitem__(self, name: str) -> Resource:
        if name == SHOWN:
            if self.shown is None:
                raise KeyError(name)
            return self.shown
        found = self.material(name)
        if found is None:
            raise KeyError(name)
        return secret(name, found.chain, found.key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._materials)

    def __len__(self) -> int:
        return len(self._materials)

    def material(self, name: str) -> Material | None:
        """Return the certificate that is shown to who says `name`, in capitals or not."""
        name = said(name)
        owner = self._project_of(name)
        for host in (name, wildcard_of(name)):
            found = self._materials.get(host)
            if found is not None and (found.shared or owner is None or owner == found.project):
                return found
        return None

    def shows(self, host: str) -> bool:
        """Whether there is a certificate to be shown for just this name, be it a wildcard."""
        return self.material(host) is not None

    def serves(self, host: str) -> bool:
        """Whether a route to `host` can be had with TLS, to a wildcard where one below it can; thought so until all is told."""
        return not self.whole or self.material(host) is not None or (host.startswith("*.") and self._below[host] > 0)

    def apply(self, batch: CertificateBatch) -> tuple[set[Name], set[str]]:
        """Take over what changed; return the secrets that this touches (a wildcard stands for all below it), and the hosts of
        challenges."""
        put = {material.host: material for material in batch.put}
        gone = set(self._materials) - set(put) - set(batch.kept) if batch.complete else set(batch.removed) - set(put)
        changed = {host for host, material in put.items() if self._materials.get(host) != material}
        for host in gone:
            if self._materials.pop(host, None) is not None:
                self._below.subtract(wildcards_over(host))
        for host in changed:
            if host not in self._materials:
                self._below.update(wildcards_over(host))
            self._materials[host] = put[host]
        self.whole = self.whole or batch.complete
        return {(Kind.SECRET, host) for host in changed | gone}, self._challenge(batch)

    def _challenge(self, batch: CertificateBatch) -> set[str]:
        if batch.challenges is None and not batch.complete:
            return set()
        wanted: dict[str, dict[str, str]] = {}
        for each in batch.challenges or ():
            wanted.setdefault(each.host, {})[each.token] = each.answer
        before, self.challenges = self.challenges, wanted
        return {host for host in {*before, *wanted} if before.get(host) != wanted.get(host)}


def secret(name: str, chain: str, key: str) -> Resource:
    """Return a certificate with its key (PEM) as Envoy takes it."""
    message = secret_pb2.Secret(name=name)
    message.tls_certificate.certificate_chain.inline_string = chain
    message.tls_certificate.private_key.inline_string = key
    return resource(Kind.SECRET, name, message)
