"""The control plane's certificates in memory, as far as an ingress sees them. Public: tests and benchmarks use it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from atoll.ingress.fake_feed import FakeFeed
from atoll.model.certificates import CertificateBatch, ChallengeAnswer, Material


class FakeCertificates(FakeFeed[CertificateBatch]):
    """What is signed, and what is to be answered for an authority."""

    def __init__(self) -> None:
        super().__init__()
        self._materials: dict[str, Material] = {}
        self._challenges: tuple[ChallengeAnswer, ...] = ()

    def put(self, *materials: Material) -> None:
        self._materials.update({material.host: material for material in materials})
        self._send(lambda revision: CertificateBatch(revision, False, materials))

    def remove(self, *hosts: str) -> None:
        for host in hosts:
            self._materials.pop(host, None)
        self._send(lambda revision: CertificateBatch(revision, False, removed=hosts))

    def challenge(self, *answers: ChallengeAnswer) -> None:
        """Have exactly these answered."""
        self._challenges = answers
        self._send(lambda revision: CertificateBatch(revision, False, challenges=answers))

    def certificates(self, ingress: str) -> AsyncIterator[CertificateBatch]:
        return self._watch(
            lambda: CertificateBatch(self._revision, True, tuple(self._materials.values()), challenges=self._challenges)
        )
