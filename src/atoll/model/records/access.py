"""Projects, and who may do what in them."""

from __future__ import annotations

import enum

from atoll.model.records.basis import Record
from atoll.model.spec import Quota


class Project(Record, frozen=True, kw_only=True):
    """Tenant boundary. Writer: API."""

    name: str
    created_at: float
    quota: Quota | None = None
    """Set by an admin."""


class Role(enum.StrEnum):
    ADMIN = "admin"
    DEPLOY = "deploy"
    READ = "read"
    AGENT = "agent"
    """A node's agent; `subject` is the node."""
    INGRESS = "ingress"
    """An ingress; `subject` is its name."""


class Token(Record, frozen=True, kw_only=True):
    """A bearer token, of which only the SHA-256 is kept. Writer: API."""

    id: str
    name: str
    role: Role
    project: str = "*"
    """`*` for all."""
    subject: str = ""
    digest: str
    created_at: float
    expires_at: float | None = None


class Secret(Record, frozen=True, kw_only=True):
    """A project's secret, sealed with the cell's key. Writer: API."""

    project: str
    name: str
    sealed: bytes
    version: int
    updated_at: float


class RequestRecord(Record, frozen=True, kw_only=True):
    """The answer to a write that carried a request key, so that a repeat gets the same. Writer: API."""

    status: int
    body: bytes
    fingerprint: str
    at: float
