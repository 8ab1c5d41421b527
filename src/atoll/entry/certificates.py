"""What the leader's certificates come from: the cell's own root, and an account at the ACME authority that was chosen."""

from __future__ import annotations

from atoll.api.service import Service
from atoll.control.answering import Answering
from atoll.control.orders import Authority, Pace
from atoll.control.signers import Signers
from atoll.model.records.certificate import AcmeSettings


def signers_of(service: Service, pace: Pace = Pace()) -> Signers:
    """Return what signs hostnames, over the service's key of the cell."""
    roots = service.certificate_roots

    def connect(settings: AcmeSettings) -> Authority:
        from atoll.control.acme import AcmeAccount  # its library takes 0.2 s to load, and most cells never need it

        return AcmeAccount(settings, roots.keys_of(settings))

    return Signers(service.context.sealer, roots.sign, connect, pace, Answering(service.context.state))
