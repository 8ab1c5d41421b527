"""What a registry's answers and silences mean as errors of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterator

import httpx

from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted, ImageError, Unavailable


class Retriable(Exception):
    """The try failed in a way that another may mend; `error` is what the caller sees after the last."""

    def __init__(self, error: AtollError, *, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


@contextlib.contextmanager
def network_errors(host: str) -> Iterator[None]:
    """Turn httpx's errors into ours: a hang into DeadlineExceeded, other failures of the connection into Retriable."""
    try:
        yield
    except httpx.TimeoutException as error:
        kind = "does not accept a connection" if isinstance(error, httpx.ConnectTimeout) else "hangs: no byte arrived in time"
        raise Retriable(DeadlineExceeded(f"registry {host} {kind}", mend="check the registry and the network between")) from None
    except httpx.TransportError as error:
        raise Retriable(
            Unavailable(
                f"registry {host} does not answer: {str(error) or type(error).__name__}", mend="check its address and that it runs"
            )
        ) from None
    except (httpx.InvalidURL, UnicodeError):
        raise ImageError(f"registry {host} has no usable address", mend="check the image's host name") from None


async def read_bounded(response: httpx.Response, bytes_max: int, what: str) -> bytes:
    """Return the body. Raises ImageError when it is longer than `bytes_max`, however long it says it is."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > bytes_max:
            raise ImageError(f"{what} has more than {bytes_max} bytes")
    return bytes(body)


def refused(host: str, why: str) -> ImageError:
    return ImageError(f"registry {host} refuses: {why}", mend="check the registry's credentials and the image's name")


def is_loopback(host: str) -> bool:
    """Whether `HOST[:PORT]` is this machine, so that plain http is safe."""
    name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def raise_for_status(response: httpx.Response, host: str, method: str) -> None:
    status = response.status_code
    if status == 507:
        raise Exhausted(f"the disk of registry {host} is full", mend="make room there, then try again")
    if status == 429 or status >= 500:
        after = response.headers.get("Retry-After", "")
        error = Unavailable(f"registry {host} answers {status} to {method}", mend="try again later")
        raise Retriable(error, after_s=float(after) if after.isascii() and after.isdigit() else None)
    if status in (401, 403):
        raise refused(host, f"status {status}")
