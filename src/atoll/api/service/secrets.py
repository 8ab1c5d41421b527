"""Secrets: values go in and are sealed at once; they come out only for the node that runs the instance."""

from __future__ import annotations

from atoll.api.service.access import check_name
from atoll.api.service.context import Context, Draft, RequestKey, check_match
from atoll.api.service.pages import page
from atoll.api.service.projects import require_project
from atoll.model import codec, keys
from atoll.model.errors import Conflict, NotFound
from atoll.model.ports.store import Delete, Put, absent, unchanged
from atoll.model.records import App, Secret
from atoll.model.spec import Workload
from atoll.model.views import Page, SecretView
from atoll.store.cache import Held


class Secrets:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state

    def all(self, project: str, *, limit: int, after: str = "") -> Page[SecretView]:
        require_project(self._context, project)
        return page(self._state, Secret, project + "/", _view, limit=limit, after=after)

    async def put(
        self, project: str, name: str, value: str, *, if_match: int | None = None, request: RequestKey | None = None
    ) -> SecretView:
        """Set a secret. Instances that run keep the old value until they start anew. Safe to repeat."""
        check_name(name, "name")

        def build() -> Draft[SecretView]:
            require_project(self._context, project)
            held = self._state.get(Secret, f"{project}/{name}")
            check_match(held, if_match, f"secret '{name}'")
            key = keys.secret(project, name)
            secret = Secret(
                project=project,
                name=name,
                sealed=self._context.sealer.seal(value.encode(), key),
                version=1 + (held.record.version if held is not None else 0),
                updated_at=self._context.clock.now(),
            )
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(secret))],
                answer=lambda revision: _view(Held(secret, revision, revision)),
            )

        return await self._context.write(SecretView, build, request)

    async def delete(self, project: str, name: str, *, request: RequestKey | None = None) -> SecretView:
        """Raises NotFound, and Conflict while an app's current release uses it."""

        def build() -> Draft[SecretView]:
            held = self._state.get(Secret, f"{project}/{name}")
            if held is None:
                require_project(self._context, project)
                raise NotFound(f"no secret '{name[:60]}' in project '{project}'", mend="'atoll secrets list' lists them")
            for key, app in self._state.records(App).items():
                if key.startswith(project + "/") and not app.record.deleting and name in app.record.spec.secrets.values():
                    mend = "deploy the app without it first"
                    raise Conflict(f"secret '{name}' is used by app '{app.record.name}'", mend=mend)
            key = keys.secret(project, name)
            view = _view(held)
            return Draft(compare=[unchanged(key, held.revision)], ops=[Delete(key)], answer=lambda _: view)

        return await self._context.write(SecretView, build, request)

    def reveal(self, project: str, spec: Workload) -> dict[str, str]:
        """Return environment variable → value for one workload. Raises NotFound naming a missing secret, Corrupt."""
        values = {}
        for variable, name in spec.secrets.items():
            held = self._state.get(Secret, f"{project}/{name}")
            if held is None:
                mend = f"set it with 'atoll secrets set {name}'"
                raise NotFound(f"no secret '{name}' in project '{project}'", field=f"secrets.{variable}", mend=mend)
            values[variable] = self._context.sealer.open(held.record.sealed, keys.secret(project, name)).decode()
        return values


def _view(held: Held[Secret]) -> SecretView:
    secret = held.record
    return SecretView(project=secret.project, name=secret.name, version=secret.version, updated_at=secret.updated_at)
