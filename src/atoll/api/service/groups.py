"""Apps that depend on each other: what may depend on what, and a group of them in one write."""

from __future__ import annotations

from atoll.api.service.access import Caller
from atoll.api.service.apps import Apps
from atoll.api.service.callers import ensure_for
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.model.errors import Conflict, Invalid
from atoll.model.ports.store import Compare, Op, Revision
from atoll.model.spec import AppSpec
from atoll.model.views import GROUP_MAX, AppView, GroupView


class Groups:
    def __init__(self, context: Context, apps: Apps) -> None:
        self._context = context
        self._apps = apps

    async def put(
        self, caller: Caller, project: str, specs: tuple[AppSpec, ...], *, request: RequestKey | None = None
    ) -> GroupView:
        """Make or change several apps of a project: all of them, or none where one cannot be. Safe to repeat.

        Raises what `Apps.put` does, naming the app; Invalid for a name that is there twice, too many, a cycle, or a dependency
        that nobody knows.
        """
        if not 0 < len(specs) <= GROUP_MAX:
            raise Invalid(f"apps: {len(specs)} of them; a group has 1 to {GROUP_MAX}", field="apps")
        names = [spec.name for spec in specs]
        for index, spec in enumerate(specs):
            if spec.name in names[:index]:
                raise Invalid(f"apps[{index}].name: '{spec.name}' is there twice", field=f"apps[{index}].name")
            if spec.project != project:
                raise Invalid(f"apps[{index}].project: '{spec.project}', the path says '{project}'", field=f"apps[{index}].project")
            try:
                self._apps.check(spec)
            except Invalid as error:
                field = f"apps[{index}].{error.field}" if error.field else f"apps[{index}]"
                raise Invalid(f"app '{spec.name}': {error}", field=field, mend=error.mend) from None
        beside = {spec.name: spec for spec in specs}

        def build() -> Draft[GroupView]:
            drafts = [self._apps.draft(caller, spec, None, beside) for spec in specs]
            compare: list[Compare] = [each for draft in drafts for each in draft.compare]
            ops: list[Op] = [each for draft in drafts for each in draft.ops]
            written: set[str] = set()
            for op in ops:
                if op.key in written:
                    place = op.key.partition("/")[2]
                    raise Conflict(f"two apps of the group want {place}", field="apps", mend="give each route to one of them")
                written.add(op.key)

            def answer(revision: Revision) -> GroupView:
                views: tuple[AppView, ...] = tuple(draft.answer(revision) for draft in drafts)
                return GroupView(apps=views, revision=revision)

            return Draft(compare=_once(compare), ops=ops, answer=answer)

        await ensure_for(self._context, specs)
        return await self._context.write(GroupView, build, request)


def _once(compare: list[Compare]) -> list[Compare]:
    return list(dict.fromkeys(compare))
