"""Projects: the boundary between tenants."""

from __future__ import annotations

from msgspec.structs import replace

from atoll.api.service.access import Caller, check_name
from atoll.api.service.claims import DEFAULT_PROJECT
from atoll.api.service.context import Context, Draft, RequestKey, check_match
from atoll.api.service.pages import page
from atoll.model import keys, stored
from atoll.model.errors import NotFound
from atoll.model.ports.store import Put, absent, unchanged
from atoll.model.records import Project
from atoll.model.spec import Quota, check_quota
from atoll.model.views import Page


def require_project(context: Context, name: str) -> None:
    """Raise NotFound for a project that nobody has made. `default` is there from the beginning."""
    if name != DEFAULT_PROJECT and context.state.get(Project, name) is None:
        raise NotFound(f"no project '{name[:60]}'", mend="an admin makes it: atoll projects create NAME")


class Projects:
    def __init__(self, context: Context) -> None:
        self._context = context

    def all(self, caller: Caller, *, limit: int, after: str = "") -> Page[Project]:
        """Return the projects that `caller` reaches into."""
        state = self._context.state
        seen = page(state, Project, "", lambda held: held.record, limit=limit, after=after, keep=lambda p: caller.sees(p.name))
        if not caller.sees(DEFAULT_PROJECT) or after >= DEFAULT_PROJECT or state.get(Project, DEFAULT_PROJECT) is not None:
            return seen
        # It is there without a record, too.
        items = sorted((*seen.items, Project(name=DEFAULT_PROJECT, created_at=0.0)), key=lambda project: project.name)
        more = seen.next is not None or len(items) > limit
        items = items[:limit]
        return Page(items=tuple(items), revision=seen.revision, next=items[-1].name if more else None)

    async def put(self, name: str, *, request: RequestKey | None = None) -> Project:
        """Make a project; one that is there already is returned as it is. Safe to repeat."""
        check_name(name, "project")

        def build() -> Draft[Project]:
            held = self._context.state.get(Project, name)
            if held is not None:
                record = held.record
                return Draft(answer=lambda _: record)
            project = Project(name=name, created_at=self._context.clock.now())
            key = keys.project(name)
            return Draft(compare=[absent(key)], ops=[Put(key, stored.encode(project))], answer=lambda _: project)

        return await self._context.write(Project, build, request)

    async def set_quota(
        self, name: str, quota: Quota, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> Project:
        """Limit what the project's instances may hold together; what runs already is left alone. Safe to repeat.

        Raises Invalid, NotFound, and StaleRevision where `if_match`, of a `QuotaView`, is not the newest. An empty quota takes
        every limit away.
        """
        check_name(name, "project")
        check_quota(quota)

        def build() -> Draft[Project]:
            require_project(self._context, name)
            held = self._context.state.get(Project, name)
            check_match(held, if_match, f"the quota of project '{name}'")
            project = held.record if held is not None else Project(name=name, created_at=self._context.clock.now())
            project = replace(project, quota=quota if quota != Quota() else None)
            key = keys.project(name)
            first = unchanged(key, held.revision) if held is not None else absent(key)
            return Draft(compare=[first], ops=[Put(key, stored.encode(project))], answer=lambda _: project)

        return await self._context.write(Project, build, request)
