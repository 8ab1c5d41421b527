"""How the ingress knows an app's instances that speak TLS themselves."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord

PINS_MAX = 4
CALLER_CA_DIRECTORY = "/etc/atoll/ingress"
CALLER_CA = f"{CALLER_CA_DIRECTORY}/ca.pem"
"""In instances of apps with `mutual`: the authority that signs what ingresses show, and nothing else."""
_NAME = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$(?!\n)"
_PIN_BYTES = 32


class InstanceTls(SpecRecord, frozen=True, kw_only=True):
    """The app's `http` ports speak TLS, and whoever cannot show a certificate by `ca` or of a key in `pins` gets no request."""

    ca: Annotated[str, Meta(max_length=16_384)] = ""
    """PEM: who must have signed the instance's certificate."""
    name: (
        Annotated[str, Meta(pattern=_NAME, max_length=253, description="a hostname of lower-case letters, digits, '-' and '.'")]
        | None
    ) = None
    """With `ca`: a name that the certificate must have; it is asked for by it, too (SNI)."""
    pins: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=PINS_MAX)] = ()
    """SHA-256 of public keys (SubjectPublicKeyInfo) in base64, of which the instance must have one."""
    mutual: bool = False
    """The ingress shows a certificate, too: by the authority in `CALLER_CA`, which instances are to ask for one. Where `ca` is
    given and no `name`, the instance's own must be for `APP.PROJECT.internal`."""


def check_instance_tls(tls: InstanceTls) -> None:
    """Raise Invalid for TLS by which no instance could be known, or anybody."""
    field = "ingress.instance_tls"
    if bool(tls.ca) == bool(tls.pins):
        raise Invalid(f"{field}: exactly one of ca and pins", field=field, mend="say by what an instance is known")
    if tls.name is not None and not tls.ca:
        raise Invalid(f"{field}.name: only with ca", field=f"{field}.name", mend="leave it out")
    if tls.ca:
        from atoll.model.chains import describe  # it needs the records, and they the specs

        try:
            describe(tls.ca)
        except Invalid as error:
            raise Invalid(f"{field}.ca: {error.message.removeprefix('chain: ')}", field=f"{field}.ca", mend=error.mend) from None
    for index, pin in enumerate(tls.pins):
        try:
            good = len(base64.b64decode(pin, validate=True)) == _PIN_BYTES
        except (binascii.Error, ValueError):
            good = False
        if not good:
            where = f"{field}.pins[{index}]"
            mend = "openssl x509 -in CERT -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64"
            raise Invalid(f"{where}: not the SHA-256 of a key in base64", field=where, mend=mend)
