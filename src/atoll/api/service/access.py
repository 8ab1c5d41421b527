"""Who calls, and what they may do."""

from __future__ import annotations

import enum
import re

from msgspec import Struct

from atoll.model.errors import Forbidden, Invalid
from atoll.model.records import Role
from atoll.model.spec import NAME_PATTERN

_NAME = re.compile(NAME_PATTERN)
_ID = re.compile(r"^[a-z0-9](?:[-a-z0-9.]{0,118}[a-z0-9])?$")
EVERY_PROJECT = "*"


class Need(enum.Enum):
    """What a call asks of its caller."""

    NOTHING = "nothing"
    ANY = "any"
    """Any good token."""
    READ = "read"
    DEPLOY = "deploy"
    ADMIN = "admin"
    ADMIN_OF_PROJECT = "admin-of-project"
    """Admin, of the whole cell or of the project that it concerns."""
    AGENT = "agent"
    """The agent of the node that the path names."""
    INGRESS = "ingress"
    """The ingress that the path names."""
    PEER = "peer"
    """Another server of the cell."""
    PULL = "pull"
    """To read images: whoever may read, and agents."""


_ROLES: dict[Need, frozenset[Role]] = {
    Need.NOTHING: frozenset(Role),
    Need.ANY: frozenset(Role),
    Need.READ: frozenset({Role.READ, Role.DEPLOY, Role.ADMIN}),
    Need.DEPLOY: frozenset({Role.DEPLOY, Role.ADMIN}),
    Need.ADMIN: frozenset({Role.ADMIN}),
    Need.ADMIN_OF_PROJECT: frozenset({Role.ADMIN}),
    Need.AGENT: frozenset({Role.AGENT}),
    Need.INGRESS: frozenset({Role.INGRESS}),
    Need.PEER: frozenset(),
    Need.PULL: frozenset({Role.READ, Role.DEPLOY, Role.ADMIN, Role.AGENT}),
}


class Caller(Struct, frozen=True, kw_only=True):
    """Who holds a token or a certificate, as far as rules need to know."""

    id: str
    role: Role
    project: str = EVERY_PROJECT
    subject: str = ""
    name: str = ""
    digest: str = ""
    """Of the token; empty where a certificate says who calls."""
    authority: str = ""
    """Id of the authority that signed the certificate; empty where a token says who calls."""
    expires_at: float | None = None
    """Of the certificate or token; None where it has no end."""

    def sees(self, project: str) -> bool:
        """Whether the token reaches into `project`."""
        return self.project in (EVERY_PROJECT, project)


SYSTEM = Caller(id="system", role=Role.ADMIN, name="system")
"""The server itself, for what it does on its own behalf."""


def authorize(caller: Caller, need: Need, *, project: str | None = None, subject: str | None = None) -> None:
    """Raise Forbidden unless `caller` has the role for `need`, within `project` and as `subject` where they are given.

    With `project` None for a call that concerns the whole cell, ADMIN needs a token for all projects.
    """
    if caller.role not in _ROLES[need]:
        allowed = " or ".join(sorted(role.value for role in _ROLES[need]))
        raise Forbidden(f"a token with role '{caller.role}' may not do this; it needs {allowed}", mend="use another token")
    if project is not None and not caller.sees(project):
        raise Forbidden(f"this token is for project '{caller.project}', not '{project}'", mend="use a token for that project")
    if project is None and need is Need.ADMIN and caller.project != EVERY_PROJECT:
        raise Forbidden("this concerns the whole cell; the token is for one project", mend="use an admin token for all projects")
    if subject is not None and caller.subject != subject:
        raise Forbidden(f"this token is for '{caller.subject}', not '{subject}'")


def check_name(value: str, field: str) -> str:
    """Return `value` if it is a name. Raises Invalid, so that nothing else ever becomes part of a key or a path."""
    if _NAME.match(value) is None or value.endswith("\n"):
        raise Invalid(f"{field}: {value[:60]!r} is not a name: lower-case letters, digits and '-', at most 40", field=field)
    return value


def check_id(value: str, field: str) -> str:
    """Return `value` if it can be the id of an instance, node, token or ingress. Raises Invalid."""
    if _ID.match(value) is None or value.endswith("\n"):
        raise Invalid(f"{field}: {value[:60]!r} is not an id: lower-case letters, digits, '-' and '.', at most 120", field=field)
    return value
