"""Several apps in one file: `[[apps]]`, deployed together and in the order of what they depend on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.cli.session import Session
from atoll.model.errors import AtollError, Invalid

if TYPE_CHECKING:
    from atoll.model.views import AppView
    from atoll.sdk.client import Client

POLL_S = 0.5
STILL_S = 900.0
"""How long nothing may change until following it is given up; the cell goes on."""


class GroupFailed(AtollError):
    """An app of the group did not come up."""

    code = "group-failed"


async def deploy(session: Session, data: dict[str, Any], path: Path, *, detach: bool) -> None:
    """Build what is to be built, write all apps at once, and follow them until all serve. Raises why one does not."""
    from msgspec.structs import replace

    from atoll.cli.building import build_and_push
    from atoll.cli.deploy import spec_of
    from atoll.cli.rollout import heard_from_ingresses, show_refused

    others = sorted(data.keys() - {"apps", "project"})
    if others:
        raise Invalid(f"{path}: {others[0]} beside [[apps]]", field=others[0], mend="write it into each of the apps")
    if not isinstance(data["apps"], list) or not all(isinstance(each, dict) for each in data["apps"]):
        raise Invalid(f"{path}: apps is no list of tables", field="apps", mend="write [[apps]] before each of them")
    project = session.project if session.project_given else data.get("project", session.project)
    specs = [spec_of({"project": project, **each}, path) for each in data["apps"]]
    session.use_project(project)
    async with session.client() as client:
        for index, spec in enumerate(specs):
            if spec.build is not None and spec.image is None:
                specs[index] = replace(spec, image=await build_and_push(session, client, spec, path.parent))
        view = await client.put_apps(project, specs)
        names = [each.app.name for each in view.apps]
        began = time.monotonic()
        views = list(view.apps) if detach else await _follow(session, client, names)
        if not detach:
            views = [await heard_from_ingresses(client, name, project, time.monotonic() - began) for name in names]
    if session.json:
        session.output.json(views)
        return
    if detach:
        session.output.say(f"{len(names)} apps are accepted; see: atoll apps")
        return
    for each in views:
        session.output.say(f"[green]✓[/] {each.app.name} release {each.app.release} serves")
        for url in each.urls:
            session.output.print(url)
        show_refused(session, each)


async def _follow(session: Session, client: Client, names: list[str]) -> list[AppView]:
    """Return the apps when all serve what is wanted; each change is a line on stderr. Raises GroupFailed."""
    told: dict[str, tuple[str, str]] = {}
    changed_at = time.monotonic()
    while True:  # bounded by STILL_S without a change, below
        views = [await client.app(session.project, name) for name in names]
        for view in views:
            said = _said(view)
            if told.get(view.app.name) != said:
                told[view.app.name], changed_at = said, time.monotonic()
                words = f"{view.app.name} {said[0]}" + (f" ({said[1]})" if said[1] else "")
                session.output.err.print(words, markup=False, soft_wrap=True)
        failed = next((view for view in views if told[view.app.name][0] == "failed"), None)
        if failed is not None:
            raise GroupFailed(f"{failed.app.name}: {told[failed.app.name][1]}", mend=f"see: atoll status {failed.app.name}")
        if all(told[name][0] in ("running", "stopped", "asleep") for name in names):
            return views
        if time.monotonic() - changed_at > STILL_S:
            waiting = next(name for name in names if told[name][0] not in ("running", "stopped", "asleep"))
            raise GroupFailed(f"{waiting} still is {told[waiting][0]}", mend=f"it goes on; see: atoll status {waiting}")
        await asyncio.sleep(POLL_S)


def _said(view: AppView) -> tuple[str, str]:
    """Return the state of the wanted release, and what is to be said of it."""
    status = view.status
    if status is None or (status.release != view.app.release and not status.waits_for):
        return "deploying", ""
    if status.waits_for:
        return "waiting", f"for {', '.join(status.waits_for)}"
    return str(status.phase), status.message
