"""Certificates for tests: an authority, and whatever it is asked to sign, good or bad."""

from __future__ import annotations

import datetime
import ipaddress
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from atoll.model.certificates import Material

DAY_S = 86_400.0


def pem(key: Any, password: str | None = None) -> str:
    how = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    return str(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how).decode())


def new_key(kind: str = "ec") -> Any:
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    return ec.generate_private_key(ec.SECP256R1())


class Maker:
    """An authority, or one that another has signed."""

    def __init__(self, name: str = "root", above: Maker | None = None, now: float | None = None) -> None:
        self.now = now if now is not None else datetime.datetime.now(datetime.UTC).timestamp()
        self._above = above
        self.key = new_key()
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, signer = (above._name, above.key) if above is not None else (self._name, self.key)
        self.certificate = (
            self._builder(self._name, issuer, self.key.public_key(), -DAY_S, 3650 * DAY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(signer, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def sign(
        self,
        *names: str,
        key: Any = None,
        begins_s: float = -60.0,
        ends_s: float = 30 * DAY_S,
        uses: tuple[Any, ...] = (ExtendedKeyUsageOID.SERVER_AUTH,),
        addresses: tuple[str, ...] = (),
    ) -> tuple[str, str]:
        """Return a chain without the root, and its key (PEM)."""
        private = key or new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
        builder = self._builder(subject, self._name, private.public_key(), begins_s, ends_s)
        if names:
            named: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
            named += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
            builder = builder.add_extension(x509.SubjectAlternativeName(named), critical=False)
        if uses:
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        leaf = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
        return leaf + (self.pem if self._above is not None else ""), pem(private)

    def material(self, host: str, *, project: str = "default", shared: bool = False, key: Any = None) -> Material:
        chain, private = self.sign(host, key=key)
        return Material(host=host, project=project, chain=chain, key=private, shared=shared)

    def _builder(self, subject: x509.Name, issuer: x509.Name, key: Any, begins_s: float, ends_s: float) -> x509.CertificateBuilder:
        moment = datetime.datetime.fromtimestamp
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(moment(self.now + begins_s, datetime.UTC))
            .not_valid_after(moment(self.now + ends_s, datetime.UTC))
        )
