"""A chain of certificates and its key, as files hold them: read, checked for a hostname, described (RFC 5280, RFC 6125)."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from atoll.model.certificates import CHAIN_CHARS_MAX, KEY_CHARS_MAX, covers
from atoll.model.errors import Invalid

CHAIN_MAX = 10
"""Certificates in a chain."""
RSA_BITS_MIN = 2048
RSA_BITS_MAX = 4096
"""More than that costs an ingress milliseconds for each connection."""
CURVES = ("secp256r1", "secp384r1", "secp521r1")
EARLY_S = 300.0
"""How far a clock may be behind that of who signed."""
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_ENCRYPTED = ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "Proc-Type: 4,ENCRYPTED")
_WEAK = (hashes.MD5, hashes.SHA1)


class Described(Struct, frozen=True, kw_only=True):
    """What a certificate says of itself."""

    names: tuple[str, ...]
    issuer: str
    fingerprint: str
    """SHA-256, in hexadecimal."""
    not_before: float
    not_after: float


class Checked(Struct, frozen=True, kw_only=True):
    """A chain and a key that a TLS server can show; `chain` and `key` are PEM without anything else in it."""

    chain: str
    key: str
    described: Described

    def __repr__(self) -> str:
        return f"Checked({self.described!r})"


def describe(chain: str) -> Described:
    """Return what the first certificate of `chain` says. Raises Invalid."""
    return _described(_certificates(chain)[0])


def check_chain(host: str, chain: str, key: str, now: float) -> Checked:
    """Return chain and key if an ingress can show them for `host` at `now`. Raises Invalid, naming `chain` or `key`."""
    certificates = _certificates(chain)
    private = _key(key)
    public = _bytes_of(private.public_key())
    leaf = certificates[0]
    if _bytes_of(leaf.public_key()) != public:
        if any(_bytes_of(other.public_key()) == public for other in certificates[1:]):
            raise _bad("chain", "the chain is in the wrong order", "put the certificate of this key first, then who signed each")
        raise _bad("key", "the key does not belong to the certificate", "give the key that the certificate was asked for with")
    _check_order(certificates)
    described = _described(leaf)
    _check_leaf(host, leaf, described, now)
    for certificate in certificates[1:]:
        if certificate.not_valid_after_utc.timestamp() <= now:
            raise _bad("chain", f"the chain's certificate of {_name(certificate.subject)} has expired", "take the chain of today")
    pem = "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)
    plain = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return Checked(chain=pem, key=plain, described=described)


def _check_leaf(host: str, leaf: x509.Certificate, described: Described, now: float) -> None:
    if described.not_after <= now:
        raise _bad("chain", f"the certificate expired on {_date(described.not_after)}", "have it renewed")
    if described.not_before > now + EARLY_S:
        raise _bad("chain", f"the certificate is not valid before {_date(described.not_before)}", "wait, or look at the clock")
    if not described.names:
        raise _bad("chain", "the certificate names no host (it has no subject alternative name)", f"have {host} put into it")
    if not any(covers(name.lower(), host) for name in described.names):
        named = ", ".join(described.names[:5]) + (", …" if len(described.names) > 5 else "")
        raise _bad("chain", f"the certificate is for {named[:300]}, not for {host}", "add it under a name that it is for")
    if isinstance(leaf.signature_hash_algorithm, _WEAK):
        raise _bad("chain", "the certificate is signed with SHA-1 or MD5", "have it signed with SHA-256")
    try:
        uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if ExtendedKeyUsageOID.SERVER_AUTH not in uses and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in uses:
        raise _bad("chain", "the certificate is not for servers (extended key usage)", "ask for one with serverAuth")


def _check_order(certificates: Sequence[x509.Certificate]) -> None:
    for position, (issued, issuer) in enumerate(itertools.pairwise(certificates), 1):
        if _issued_by(issued, issuer):
            continue
        if any(_issued_by(issued, other) for other in certificates if other is not issuer and other is not issued):
            raise _bad("chain", "the chain is in the wrong order", "put the hostname's certificate first, then who signed each")
        text = f"the certificate {position + 1} of the chain ({_name(issuer.subject)}) has not signed the one before it"
        raise _bad("chain", text, "leave it out, or give the chain that your authority sent")


def _certificates(chain: str) -> list[x509.Certificate]:
    if len(chain) > CHAIN_CHARS_MAX:
        raise _bad("chain", f"over {CHAIN_CHARS_MAX} characters", "give the hostname's certificate and who signed it, nothing else")
    found = _CERTIFICATE.findall(chain)
    if not found:
        raise _bad("chain", "there is no certificate in it", "give PEM: text that begins with -----BEGIN CERTIFICATE-----")
    if len(found) > CHAIN_MAX:
        raise _bad("chain", f"over {CHAIN_MAX} certificates", "give the hostname's certificate and who signed it, nothing else")
    try:
        certificates = [x509.load_pem_x509_certificate(one.encode()) for one in found]
        for one in certificates:
            _bytes_of(one.public_key())
            _described(one)
    except Exception:  # noqa: BLE001 (whatever the parser makes of a stranger's bytes, it is not a certificate)
        raise _bad("chain", "a certificate in it is damaged", "give it as your authority sent it") from None
    return certificates


def _key(key: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if len(key) > KEY_CHARS_MAX:
        raise _bad("key", f"over {KEY_CHARS_MAX} characters", "give the private key alone")
    if any(mark in key for mark in _ENCRYPTED):
        raise _bad("key", "the key is encrypted", "take the passphrase away: openssl pkey -in KEY -out PLAIN")
    if "PRIVATE KEY-----" not in key:
        raise _bad("key", "there is no private key in it", "give PEM: text that begins with -----BEGIN PRIVATE KEY-----")
    # A file may have parameters or certificates around the key.
    start = re.search(r"-----BEGIN [A-Z ]*PRIVATE KEY-----", key)
    try:
        private: PrivateKeyTypes = serialization.load_pem_private_key(key[start.start() if start else 0 :].encode(), None)
    except Exception:  # noqa: BLE001 (as above)
        raise _bad("key", "the key is damaged", "give it as it was made") from None
    match private:
        case rsa.RSAPrivateKey():
            if private.key_size < RSA_BITS_MIN:
                raise _bad("key", f"an RSA key of {private.key_size} bits is too weak", f"take {RSA_BITS_MIN} bits, or ECDSA P-256")
            if private.key_size > RSA_BITS_MAX:
                raise _bad(
                    "key", f"an RSA key of {private.key_size} bits is too slow", f"at most {RSA_BITS_MAX} bits, or ECDSA P-256"
                )
            return private
        case ec.EllipticCurvePrivateKey() if private.curve.name in CURVES:
            return private
    raise _bad("key", "TLS of browsers has no use for this kind of key", "take ECDSA on P-256, P-384 or P-521, or RSA")


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _described(certificate: x509.Certificate) -> Described:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = tuple(extension.value.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        names = ()
    return Described(
        names=names,
        issuer=_name(certificate.issuer),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def _name(name: x509.Name) -> str:
    return name.rfc4514_string()[:200]


def _bytes_of(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _date(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _bad(field: str, message: str, mend: str) -> Invalid:
    return Invalid(f"{field}: {message}", field=field, mend=mend)
