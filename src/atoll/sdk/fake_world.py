"""What the API in memory holds, and the world that obeys it at once."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec.structs import replace

from atoll.model import codec
from atoll.model.errors import NotFound
from atoll.model.records import (
    AppPhase,
    AppStatus,
    Event,
    Exit,
    Instance,
    JobPhase,
    JobStatus,
    OwnerKind,
    Project,
    Severity,
    Status,
)
from atoll.model.spec import AppSpec, JobSpec, RuntimeName
from atoll.model.states import Phase
from atoll.model.views import WatchLine
from atoll.scheduling.assembly import Records, snapshot_from
from atoll.scheduling.snapshot import Snapshot

START_AT = 1_700_000_000.0


class FakeWorld:
    """Records, their watchers, and what controllers and agents would make of them in time."""

    def __init__(self) -> None:
        self.revision = 0
        self.now = START_AT
        self.records: dict[tuple[str, str], tuple[Any, int]] = {}
        """(kind, key) → record and its revision."""
        self.failing: dict[str, str] = {}
        """App or job → why its instances fail."""
        self.watchers: set[asyncio.Queue[WatchLine | None]] = set()
        self.put("projects", "default", Project(name="default", created_at=self.now))

    def put(self, kind: str, key: str, record: Any) -> int:
        """Write a record and tell the watchers."""
        self.revision += 1
        self.records[kind, key] = (record, self.revision)
        self._tell(WatchLine(revision=self.revision, kind=kind, key=key, record=codec.to_plain(record)))
        return self.revision

    def remove(self, kind: str, key: str) -> None:
        if self.records.pop((kind, key), None) is not None:
            self.revision += 1
            self._tell(WatchLine(revision=self.revision, kind=kind, key=key))

    def get(self, kind: str, key: str) -> tuple[Any, int]:
        """Raises NotFound."""
        try:
            return self.records[kind, key]
        except KeyError:
            raise NotFound(f"no {kind.rstrip('s')} {key.rpartition('/')[2]!r}") from None

    def under(self, kind: str, prefix: str = "") -> list[tuple[Any, int]]:
        return [found for (of, key), found in sorted(self.records.items()) if of == kind and key.startswith(prefix)]

    def event(self, subject: str, code: str, message: str, *, project: str = "default", severity: Severity = Severity.INFO) -> None:
        self.now += 1
        id = f"{int(self.now)}-{self.revision:06d}"
        record = Event(id=id, at=self.now, project=project, subject=subject, code=code, message=message, severity=severity)
        self.put("events", f"{project}/{id}", record)

    def cut_watches(self) -> None:
        """Break every watch's connection."""
        for queue in self.watchers:
            queue.put_nowait(None)

    def _tell(self, line: WatchLine) -> None:
        for queue in self.watchers:
            queue.put_nowait(line)

    def settle(self, project: str, name: str) -> None:
        """Bring instances and status of an app to what its record wants, as controllers and agents would in time."""
        key = f"{project}/{name}"
        app, _ = self.get("apps", key)
        why = self.failing.get(name)
        if not why:
            self.stop_all(project, name)
        for index in range(app.replicas):
            id = f"{name}-{app.release}{app.generation}{index}abc"
            instance = Instance(
                id=id,
                project=project,
                owner_kind=OwnerKind.APP,
                owner=name,
                release=app.release,
                generation=app.generation,
                node="n1",
                runtime=RuntimeName.RUNC,
                created_at=self.now,
            )
            self.put("instances", f"{project}/{id}", instance)
            status = Status(instance=id, project=project, node="n1", phase=Phase.RUNNING, ready=True, pid=100 + index)
            status = replace(status, address="10.64.0.2", started_at=self.now, phase_at=self.now, ready_at=self.now)
            if why:
                ended = Exit(code=1, at=self.now)
                status = Status(instance=id, project=project, node="n1", phase=Phase.FAILED, message=why, exit=ended)
            self.put("statuses", f"{project}/{id}", status)
        phase = AppPhase.FAILED if why else AppPhase.RUNNING if app.replicas else AppPhase.STOPPED
        ready = 0 if why else app.replicas
        told = AppStatus(
            project=project,
            name=name,
            phase=phase,
            release=app.release,
            ready=ready,
            updated=ready,
            total=app.replicas,
            message=why or "",
        )
        self.put("app-statuses", key, told)
        self.event(f"app/{name}", "failed" if why else "rolled-out", why or f"release {app.release} serves", project=project)

    def snapshot(self) -> Snapshot:
        """Return what the scheduler would plan on."""

        def plain(kind: str) -> dict[str, Any]:
            return {key: record for (of, key), (record, _) in self.records.items() if of == kind}

        apps, jobs = plain("apps"), plain("jobs")

        def spec_of(instance: Instance) -> AppSpec | JobSpec | None:
            owner = (jobs if instance.owner_kind is OwnerKind.JOB else apps).get(f"{instance.project}/{instance.owner}")
            return owner.spec if owner is not None else None

        records = Records(
            nodes=plain("nodes"),
            policies=plain("node-policies"),
            liveness={},
            instances=plain("instances"),
            statuses=plain("statuses"),
            app_statuses=plain("app-statuses"),
            jobs=jobs,
            reservations=plain("reservations"),
            now=self.now,
            sites=plain("sites"),
            ingresses=plain("ingresses"),
        )
        return snapshot_from(records, spec_of)

    def stop_all(self, project: str, owner: str) -> None:
        for instance, _ in self.under("instances", f"{project}/"):
            if instance.owner == owner:
                self.remove("instances", f"{project}/{instance.id}")
                self.remove("statuses", f"{project}/{instance.id}")

    def finish(self, project: str, spec: JobSpec, phase: JobPhase) -> None:
        id = f"{spec.name}-0abc"
        instance = Instance(
            id=id,
            project=project,
            owner_kind=OwnerKind.JOB,
            owner=spec.name,
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=self.now,
        )
        self.put("instances", f"{project}/{id}", instance)
        ok = phase is JobPhase.SUCCEEDED
        ended = Exit(code=0 if ok else 1, at=self.now + 2)
        result = Phase.SUCCEEDED if ok else Phase.FAILED
        self.put("statuses", f"{project}/{id}", Status(instance=id, project=project, node="n1", phase=result, exit=ended))
        status = JobStatus(project=project, name=spec.name, phase=phase, message=self.failing.get(spec.name, ""))
        status = replace(status, succeeded=(0,) if ok else (), started_at=self.now, finished_at=self.now + 2)
        self.put("job-statuses", f"{project}/{spec.name}", status)
