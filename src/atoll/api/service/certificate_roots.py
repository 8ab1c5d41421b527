"""The cell's own root for hostnames, and the settings of the ACME authority: the two ways to have a hostname's key signed."""

from __future__ import annotations

import base64
import binascii
import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.api.service import signing
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.model import codec, keys
from atoll.model.certificates import AcmeRequest, AcmeView, RootView
from atoll.model.chains import describe
from atoll.model.errors import Conflict, Invalid
from atoll.model.membership import EARLY_S
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import CELL
from atoll.model.records.certificate import AcmeKeys, AcmeSettings, CertificateRoot
from atoll.model.urls import url_of
from atoll.store.cache import Held

OWN_LIFE_S = 90 * 86_400.0
"""Of a certificate that the cell signs itself; browsers take none that lives longer than 398 days."""
ONLY = "cell"
"""The one record of the settings, and the root for hostnames."""
MIN_EAB_BYTES = 16


async def ensure_root(context: Context, of: str, name: str) -> CertificateRoot:
    """Return one of the cell's roots, which is made here under `name` when it is first needed. Safe to repeat."""
    key = keys.certificate_root(of)
    made: list[CertificateRoot] = []

    def build() -> Draft[CertificateRoot]:
        held = context.state.get(CertificateRoot, of)
        if held is not None:
            found = held.record
            return Draft(answer=lambda _: found)
        if not made:
            now = context.clock.now()
            certificate, private = signing.new_authority(name, CELL, now)
            made.append(CertificateRoot(certificate=certificate, sealed=context.sealer.seal(private, key), created_at=now))
        root = made[0]
        return Draft(compare=[absent(key)], ops=[Put(key, codec.encode(root))], answer=lambda _: root)

    return await context.write(CertificateRoot, build)


class CertificateRoots:
    """`own` signs hostnames with the cell's root; `acme` says which authority does where that is asked for."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    async def ensure(self) -> CertificateRoot:
        """Return the cell's root for hostnames, which is made here when it is first needed. Safe to repeat."""
        return await ensure_root(self._context, ONLY, "hostnames")

    async def root(self) -> RootView:
        root = await self.ensure()
        described = describe(root.certificate)
        return RootView(certificate=root.certificate, fingerprint=described.fingerprint, not_after=described.not_after)

    async def sign(self, host: str) -> tuple[str, bytes]:
        """Return a chain and its key (PEM) for a hostname, by the cell's root. Raises Corrupt: another key sealed the root's."""
        root = await self.ensure()
        issuer = x509.load_pem_x509_certificate(root.certificate.encode())
        signer = serialization.load_pem_private_key(self._context.sealer.open(root.sealed, keys.certificate_root()), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)  # noqa: S101 (it is one of `_new`)
        key, now = signing.new_key(), self._context.clock.now()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])]))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime.fromtimestamp(now - EARLY_S, datetime.UTC))
            .not_valid_after(datetime.datetime.fromtimestamp(now + OWN_LIFE_S, datetime.UTC))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode(), signing.key_pem(key)

    def acme(self) -> AcmeView:
        held = self._state.get(AcmeSettings, ONLY)
        return _view(held) if held is not None else AcmeView()

    async def set_acme(self, wish: AcmeRequest, *, request: RequestKey | None = None) -> AcmeView:
        """Choose the authority, and make the account key for it. Certificates that are valid stay; the next renewal goes there.

        The account key stays where the directory and the binding do. Safe to repeat. Raises Invalid.
        """
        _check(wish)
        key = keys.acme_settings()
        fresh = signing.key_pem(signing.new_key()).decode()

        def build() -> Draft[AcmeView]:
            held = self._state.get(AcmeSettings, ONLY)
            account = fresh
            if held is not None and (held.record.directory, held.record.eab_kid) == (wish.directory, wish.eab_kid):
                account = self.keys_of(held.record).account
            sealed = self._context.sealer.seal(codec.encode(AcmeKeys(account=account, eab=wish.eab_key)), key)
            record = AcmeSettings(
                directory=wish.directory,
                contact=wish.contact,
                ca=wish.ca,
                eab_kid=wish.eab_kid,
                sealed=sealed,
                updated_at=self._context.clock.now(),
            )
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(record))],
                answer=lambda revision: _view(Held(record, revision, revision)),
            )

        return await self._context.write(AcmeView, build, request)

    async def forget_acme(self, *, request: RequestKey | None = None) -> AcmeView:
        """Have no authority: nothing is renewed by ACME any more."""

        def build() -> Draft[AcmeView]:
            held = self._state.get(AcmeSettings, ONLY)
            if held is None:
                raise Conflict("no ACME authority is chosen")
            view = _view(held)
            key = keys.acme_settings()
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(AcmeView, build, request)

    def keys_of(self, settings: AcmeSettings) -> AcmeKeys:
        """Raises Corrupt."""
        return codec.decode(self._context.sealer.open(settings.sealed, keys.acme_settings()), AcmeKeys)


def _check(wish: AcmeRequest) -> None:
    mend = "for example https://acme-v02.api.letsencrypt.org/directory"
    url_of(wish.directory, what="directory", field="directory", mend=mend, schemes=("https",), query=True)
    for address in wish.contact:
        name, at, domain = address.partition("@")
        if not (name and at and "." in domain and address.isascii()) or any(char in address for char in " ,;?<>\r\n"):
            raise Invalid(f"contact: {address[:80]!r} is no mail address", field="contact", mend="for example admin@example.com")
    if bool(wish.eab_kid) != bool(wish.eab_key):
        raise Invalid("eab_kid and eab_key: both or neither", field="eab_kid", mend="the authority hands them out together")
    if wish.eab_key:
        try:
            key = base64.b64decode(wish.eab_key + "=" * (-len(wish.eab_key) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) < MIN_EAB_BYTES:
            raise Invalid("eab_key: not a key in base64url", field="eab_key", mend="give it as the authority hands it out")
    if wish.ca:
        describe(wish.ca)


def _view(held: Held[AcmeSettings]) -> AcmeView:
    settings = held.record
    return AcmeView(
        directory=settings.directory,
        contact=settings.contact,
        eab_kid=settings.eab_kid,
        updated_at=settings.updated_at,
        revision=held.revision,
    )
