"""What ingresses are told of certificates, their keys among it: the only way on which a key leaves the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from msgspec.structs import replace

from atoll.api.service.claims import answering
from atoll.api.service.context import Context
from atoll.api.service.feeds import Listener
from atoll.api.service.following import Following
from atoll.model import keys
from atoll.model.certificates import CertificateBatch, ChallengeAnswer, Material
from atoll.model.errors import Corrupt, Unavailable
from atoll.model.records.certificate import Certificate, CertificateSource, CertificateStatus
from atoll.store.cache import Deltas

AT_ONCE = 500
"""Certificates in one batch, some 3 KB each: keys that are opened before others get their turn."""

log = structlog.get_logger()


class CertificateFeeds:
    """`start` before use; `close` ends every stream."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state
        self._listeners: dict[Listener, None] = {}  # in the order they came, which repeats
        self._challenged: dict[str, dict[str, str]] = {}
        """Host → token → answer, of orders that are under way."""
        self._following = Following(self._state, "certificates", self._apply, self._rebuild)

    def start(self) -> None:
        self._following.start()

    async def close(self) -> None:
        for listener in list(self._listeners):
            listener.end()
        await self._following.close()

    async def certificates(self, ingress: str, keepalive_s: float | None = None) -> AsyncIterator[CertificateBatch]:
        """See `CertificateFeed.certificates`; with `keepalive_s`, an empty batch whenever so long nothing happened."""
        if self._following.closed:
            raise Unavailable("the server is stopping", mend="connect again")
        self.start()
        listener = Listener()
        self._listeners[listener] = None
        challenges: tuple[ChallengeAnswer, ...] | None = None
        try:
            while True:
                complete, listener.everything = listener.everything, False
                dirty, listener.dirty = listener.dirty, set()
                hosts = sorted(self._hosts() if complete else dirty)
                told: set[str] = set()
                while len(hosts) > AT_ONCE:
                    batch = self._batch(hosts[:AT_ONCE])
                    told.update(batch.kept, (material.host for material in batch.put))
                    yield batch
                    await asyncio.sleep(0)
                    del hosts[:AT_ONCE]
                last = self._batch(hosts)
                if complete:
                    last = replace(last, complete=True, removed=(), kept=tuple(sorted(told.union(last.kept, self._unread()))))
                now = self._answers()
                yield replace(last, challenges=now) if complete or now != challenges else last
                challenges = now
                await listener.wait(keepalive_s)
        finally:
            self._listeners.pop(listener, None)

    def _batch(self, hosts: list[str]) -> CertificateBatch:
        put: list[Material] = []
        removed: list[str] = []
        kept: list[str] = []
        for host in hosts:
            try:
                found = self._material(host)
            except Corrupt as error:
                # As with a record that cannot be read: who shows it has a key that could be opened, and goes on with that.
                log.error("a certificate's key cannot be opened", host=host, cause=error.message)
                kept.append(host)
                continue
            if found is not None:
                put.append(found)
            elif host not in self._unread():
                removed.append(host)
        return CertificateBatch(self._following.revision, False, tuple(put), tuple(removed), tuple(kept))

    def _hosts(self) -> set[str]:
        return {*self._state.records(Certificate), *self._state.records(CertificateStatus)}

    def _unread(self) -> set[str]:
        return {*self._state.broken(Certificate), *self._state.broken(CertificateStatus)}

    def _material(self, host: str) -> Material | None:
        """Return chain and key; None where there is no certificate yet. Raises Corrupt: its key cannot be opened."""
        held, status = self._state.get(Certificate, host), self._state.get(CertificateStatus, host)
        wanted, told = held.record if held is not None else None, status.record if status is not None else None
        if told is not None and wanted is not None and told.project != wanted.project and not wanted.shared:
            owner = answering(self._context, host)
            if owner is not None and owner[0] == told.project:
                wanted = None  # added by another project before the hostname was this one's
        if told is not None and wanted is not None and (told.project != wanted.project or wanted.source is CertificateSource.FILE):
            told = None
        if told is not None and told.chain:
            project, chain, sealed, place = told.project, told.chain, told.sealed, keys.certificate_status(host)
        elif wanted is not None and wanted.chain:
            # Handed in; or of before, until what is wanted in its place has been signed.
            project, chain, sealed, place = wanted.project, wanted.chain, wanted.sealed, keys.certificate(host)
        else:
            return None
        key = self._context.sealer.open(sealed, place).decode()
        return Material(host=host, project=project, chain=chain, key=key, shared=wanted.shared if wanted is not None else False)

    def _answers(self) -> tuple[ChallengeAnswer, ...]:
        return tuple(
            ChallengeAnswer(host=host, token=token, answer=answer)
            for host, answers in sorted(self._challenged.items())
            for token, answer in sorted(answers.items())
        )

    def _rebuild(self) -> None:
        records = self._state.records(CertificateStatus)
        self._challenged = {host: held.record.challenges for host, held in records.items() if held.record.challenges}
        for listener in self._listeners:
            listener.mark_everything()

    def _apply(self, deltas: Deltas) -> None:
        for delta in deltas.deltas:
            if delta.kind is CertificateStatus:
                challenges = delta.new.record.challenges if delta.new is not None else {}
                if challenges:
                    self._challenged[delta.key] = challenges
                else:
                    self._challenged.pop(delta.key, None)
            elif delta.kind is not Certificate:
                continue
            for listener in self._listeners:
                listener.mark(delta.key)
