"""Calls about secrets and certificates."""

from __future__ import annotations

from atoll.model.certificates import AcmeRequest, AcmeView, CertificateRequest, CertificateView, RootView, check_host
from atoll.model.views import (
    SecretRequest,
    SecretView,
)
from atoll.sdk.calls import Calls
from atoll.sdk.transport import path


class SecretCalls(Calls):
    """Part of `Client`."""

    async def secrets(self, project: str) -> list[SecretView]:
        return await self._all(SecretView, "projects", project, "secrets")

    async def put_secret(self, project: str, name: str, value: str) -> SecretView:
        return await self._write(SecretView, "PUT", path("projects", project, "secrets", name), SecretRequest(value))

    async def delete_secret(self, project: str, name: str) -> None:
        await self._delete(path("projects", project, "secrets", name))

    async def certificates(self, project: str) -> list[CertificateView]:
        return await self._all(CertificateView, "projects", project, "certificates")

    async def certificate(self, project: str, host: str) -> CertificateView:
        """Return one with its chain; its key comes out to nobody but ingresses."""
        return await self._get(CertificateView, path("projects", project, "certificates", check_host(host)))

    async def put_certificate(self, project: str, host: str, wish: CertificateRequest) -> CertificateView:
        """Add or replace the certificate of a hostname. Raises Invalid, naming `host`, `chain` or `key`, and Conflict."""
        return await self._write(CertificateView, "PUT", path("projects", project, "certificates", check_host(host)), wish)

    async def remove_certificate(self, project: str, host: str) -> None:
        await self._delete(path("projects", project, "certificates", check_host(host)))

    async def certificate_root(self) -> RootView:
        """Return what to trust for hostnames that the cell signs itself."""
        return await self._get(RootView, path("certificates", "root"))

    async def acme(self) -> AcmeView:
        return await self._get(AcmeView, path("certificates", "acme"))

    async def set_acme(self, wish: AcmeRequest) -> AcmeView:
        """Choose the authority that signs where `acme` is asked for; whoever does agrees to its terms."""
        return await self._write(AcmeView, "PUT", path("certificates", "acme"), wish)

    async def forget_acme(self) -> None:
        await self._delete(path("certificates", "acme"))
