"""X.509 for the cell's own authority (RFC 5280): making it, and certificates for machines and servers. Keys are ECDSA P-256."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from atoll.model.errors import Invalid, Unauthenticated
from atoll.model.membership import CSR_CHARS_MAX, EARLY_S, SERVER_NAME, uri_of

AUTHORITY_LIFE_S = 10 * 365 * 86_400.0
_P256 = "secp256r1"


class Subject(Struct, frozen=True, kw_only=True):
    """Whom a certificate is for. `hosts` are the DNS names and addresses of a server; machines have none."""

    kind: str
    name: str
    enrolment: str
    hosts: tuple[str, ...] = ()


class Signed(Struct, frozen=True, kw_only=True):
    certificate: str
    serial: str
    expires_at: float


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def new_authority(id: str, cell: str, now: float) -> tuple[str, bytes]:
    """Return a self-signed certificate (PEM) and its private key (PEM)."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"atoll {cell}"), x509.NameAttribute(NameOID.COMMON_NAME, id)])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key.public_key(), now, AUTHORITY_LIFE_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), key_pem(key)


def sign(
    authority: str, authority_key: bytes, subject: Subject, key: ec.EllipticCurvePublicKey, now: float, life_s: float
) -> Signed:
    """Return a certificate by `authority` for who holds `key`: a client's, or with `hosts` a server's too."""
    issuer = x509.load_pem_x509_certificate(authority.encode())
    signer = serialization.load_pem_private_key(authority_key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)  # noqa: S101 (it is one of `new_authority`)
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, subject.name), x509.NameAttribute(NameOID.SERIAL_NUMBER, subject.enrolment)]
    )
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri_of(subject.kind, subject.name))]
    if subject.hosts:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names += [_general(host) for host in dict.fromkeys((SERVER_NAME, *subject.hosts))]
    certificate = (
        _builder(name, issuer.subject, key, now, life_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return Signed(
        certificate=_pem(certificate),
        serial=f"{certificate.serial_number:x}",
        expires_at=certificate.not_valid_after_utc.timestamp(),
    )


def requested_key(csr: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request whose holder signed it. Names that it asks for are not read. Raises Invalid."""
    mend = "send a PKCS #10 request in PEM, for an ECDSA key on P-256"
    if len(csr) > CSR_CHARS_MAX:
        raise Invalid(f"csr: over {CSR_CHARS_MAX} characters", field="csr", mend=mend)
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        good = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == _P256 and request.is_signature_valid
    except Exception:  # noqa: BLE001 (whatever the parser makes of a stranger's bytes, it is not a request)
        raise Invalid("csr: not a certificate signing request", field="csr", mend=mend) from None
    if not good or not isinstance(key, ec.EllipticCurvePublicKey):
        raise Invalid("csr: not signed by its own ECDSA P-256 key", field="csr", mend=mend)
    return key


def key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's DER."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def fingerprint(certificate: str) -> bytes:
    """Return the SHA-256 of a certificate's DER, as tools show it."""
    return x509.load_pem_x509_certificate(certificate.encode()).fingerprint(hashes.SHA256())


class Shown(Struct, frozen=True, kw_only=True):
    """What a client's certificate says, as far as rules need it. An authority of the cell signed it; its key is the client's."""

    uri: str
    enrolment: str
    authority: str
    expires_at: float


def proved(certificate: str, authorities: Sequence[str], message: bytes, proof: bytes) -> Shown:
    """Return what `certificate` says, if one of `authorities` signed it and its key made `proof` of `message`.

    Whether it has expired is the caller's to judge. Raises Unauthenticated.
    """
    mend = "join anew with a token of 'atoll join-token create'"
    if len(certificate) > CSR_CHARS_MAX:
        raise Unauthenticated("the certificate is too long", mend=mend)
    try:
        shown = x509.load_pem_x509_certificate(certificate.encode())
        key = shown.public_key()
    except Exception:  # noqa: BLE001 (as above)
        raise Unauthenticated("this is no certificate", mend=mend) from None
    if not any(_signed_by(shown, authority) for authority in authorities):
        raise Unauthenticated("the certificate is of no authority that this cell trusts", mend=mend)
    try:
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 (an authority of ours signs no other)
        key.verify(proof, message, ec.ECDSA(hashes.SHA256()))
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
        enrolment = str(shown.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value)
        authority = str(shown.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (InvalidSignature, x509.ExtensionNotFound, IndexError):
        raise Unauthenticated("the certificate's own key did not sign this", mend=mend) from None
    return Shown(uri=uri, enrolment=enrolment, authority=authority, expires_at=shown.not_valid_after_utc.timestamp())


def _signed_by(certificate: x509.Certificate, authority: str) -> bool:
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: float, life_s: float
) -> x509.CertificateBuilder:
    begin = datetime.datetime.fromtimestamp(now - EARLY_S, datetime.UTC)
    end = datetime.datetime.fromtimestamp(now + life_s, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
