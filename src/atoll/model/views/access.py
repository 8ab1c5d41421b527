"""Who calls, what the cell says of itself, tokens and secrets."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from atoll.model.records import Ingress, Role
from atoll.model.spec import Name, Quota


class SecretView(Struct, frozen=True, kw_only=True):
    """A secret without its value, which never leaves the server but for the node that runs it."""

    project: str
    name: str
    version: int
    updated_at: float


class TokenView(Struct, frozen=True, kw_only=True):
    """`token` is there once, in the answer that made it."""

    id: str
    name: str
    role: Role
    project: str = "*"
    created_at: float
    expires_at: float | None = None
    token: str | None = None


class Info(Struct, frozen=True, kw_only=True):
    version: str
    cell: str
    revision: int
    store: str
    ingresses: tuple[Ingress, ...] = ()
    token: TokenView | None = None
    """The caller's own."""


class QuotaUse(Struct, frozen=True, kw_only=True):
    """What all placed instances of a project ask for together, as the scheduler counts them."""

    cpu_milli: int = 0
    memory_bytes: int = 0
    gpu_milli: int = 0
    """Thousandths of a device; of partitions their part of one."""
    instances: int = 0


class QuotaView(Struct, frozen=True, kw_only=True):
    project: str
    quota: Quota | None = None
    """None for no limit of any kind."""
    used: QuotaUse
    waiting: int = 0
    """Instances that have no node because the quota has no room for them."""
    revision: int
    """Of the project's record, 0 where `default` has none: pass it as `If-Match` to change only the quota that was read."""


class SecretRequest(Struct, frozen=True, forbid_unknown_fields=True):
    value: Annotated[str, Meta(max_length=65_536)]


class TokenRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    role: Role
    project: str = "*"
    expires_in_s: Annotated[float, Meta(gt=0)] | None = None
    subject: str = ""
