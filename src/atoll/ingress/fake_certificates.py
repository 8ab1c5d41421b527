"""The control plane's certificates in memory, as far as an ingress sees them. Public: tests and benchmarks use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from atoll.model.certificates import CertificateBatch, ChallengeAnswer, Material
from atoll.model.errors import Unavailable


class FakeCertificates:
    """Every change goes to all who watch. `available = False` breaks every watch and refuses new ones."""

    def __init__(self) -> None:
        self.watches = 0
        """How often a watch was begun."""
        self._available = True
        self._revision = 1
        self._materials: dict[str, Material] = {}
        self._challenges: tuple[ChallengeAnswer, ...] = ()
        self._queues: set[asyncio.Queue[CertificateBatch | None]] = set()

    @property
    def available(self) -> bool:
        return self._available

    @available.setter
    def available(self, value: bool) -> None:
        self._available = value
        if not value:
            for queue in self._queues:
                queue.put_nowait(None)

    def put(self, *materials: Material) -> None:
        self._materials.update({material.host: material for material in materials})
        self._send(put=materials)

    def remove(self, *hosts: str) -> None:
        for host in hosts:
            self._materials.pop(host, None)
        self._send(removed=hosts)

    def challenge(self, *answers: ChallengeAnswer) -> None:
        """Have exactly these answered."""
        self._challenges = answers
        self._send(challenges=answers)

    async def certificates(self, ingress: str) -> AsyncIterator[CertificateBatch]:
        if not self._available:
            raise Unavailable("the control plane does not answer")
        self.watches += 1
        queue: asyncio.Queue[CertificateBatch | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield CertificateBatch(self._revision, True, tuple(self._materials.values()), challenges=self._challenges)
            while (batch := await queue.get()) is not None:
                yield batch
            raise Unavailable("the control plane has gone away")
        finally:
            self._queues.discard(queue)

    def _send(
        self,
        *,
        put: tuple[Material, ...] = (),
        removed: tuple[str, ...] = (),
        challenges: tuple[ChallengeAnswer, ...] | None = None,
    ) -> None:
        self._revision += 1
        for queue in self._queues:
            queue.put_nowait(CertificateBatch(self._revision, False, put, removed, challenges=challenges))
