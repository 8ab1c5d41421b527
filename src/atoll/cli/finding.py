"""Which instance a command works in: one that a name of any kind stands for, or a sandbox's alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.sdk.client import Client

Finder = Callable[["Client", str, str], Awaitable[str]]
"""Client, project and name → the instance's id. Raises NotFound, Conflict."""


async def of_any(client: Client, project: str, name: str) -> str:
    """Return a running instance of an app or job, or the one with that id."""
    from atoll.cli.instances import one_running

    return (await one_running(client, project, name)).instance.id


async def of_sandbox(client: Client, project: str, name: str) -> str:
    """Return the instance of a sandbox; an app may have the same name."""
    from atoll.sdk.sandboxes import instance_of

    return (await instance_of(client, project, name)).id
