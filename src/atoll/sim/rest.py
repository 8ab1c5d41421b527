"""What it is for all to have come to rest: nothing is missing, nothing is too much, and nothing is left of what is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Drained,
    Instance,
    NodeHealth,
    NodeLiveness,
    OwnerKind,
    Release,
    RouteClaim,
    Status,
)
from atoll.model.states import Desired
from atoll.sim.machine import SimMachine
from atoll.sim.users import PROJECT, AppUser

if TYPE_CHECKING:
    from atoll.sim.world import World


class Rest:
    """Looks at a world. Machines that are dead for good do not count, but nothing may count on them either."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _living(self) -> list[SimMachine]:
        return [machine for machine in self._world.machines.values() if machine.name not in self._world.dead]

    def reasons(self) -> list[str]:
        """Return what is not as it must be in the end."""
        records = self._world.rules.records
        reasons = [f"{m.name} has no agent" for m in self._living() if m.agent is None]
        for name, liveness in records[NodeLiveness].items():
            dead = name in self._world.dead
            if liveness.health is not (NodeHealth.LOST if dead else NodeHealth.READY):
                reasons.append(f"node {name} is {liveness.health}" + (", and dead" if dead else ""))
        for user in self._world.app_users:
            reasons.extend(self._app_restless(user))
        reasons.extend(reason for user in self._world.job_users if (reason := user.unfinished(self._world.rules)))
        reasons.extend(reason for user in self._world.schedule_users if (reason := user.unfinished(self._world.rules)))
        reasons.extend(self._leaks())
        reasons.extend(self._gpus_restless())
        return reasons

    def _gpus_restless(self) -> list[str]:
        """Nothing may run on a device that has failed, and what is held on a machine is what its instances were given."""
        records = self._world.rules.records
        reasons = []
        for machine in self._living():
            if machine.rack is None:
                continue
            placed = {i.id: (key, i) for key, i in records[Instance].items() if i.node == machine.name and i.gpus}
            live = {id: i for id, (key, i) in placed.items() if not (key in records[Status] and records[Status][key].phase.final)}
            for id, instance in live.items():
                if bad := sorted({grant.device for grant in instance.gpus} & machine.rack.lost):
                    reasons.append(f"{id} is still on {machine.name}, whose {', '.join(bad)} have failed")
            held = set(machine.rack.held())
            if held != set(live):
                reasons.append(f"{machine.name} holds devices for {sorted(held)}, and should for {sorted(live)}")
        return reasons

    def _app_restless(self, user: AppUser) -> list[str]:
        key = f"{PROJECT}/{user.app}"
        records = self._world.rules.records
        everything = [i for i in records[Instance].values() if (i.owner_kind, i.owner) == (OwnerKind.APP, user.app)]
        instances = [i for i in everything if not i.standby]
        standing = [i for i in everything if i.standby]
        if not user.exists:
            left = [kind.__name__ for kind in (App, AppStatus) if key in records[kind]]
            left += ["release" for name in records[Release] if name.startswith(key + "/")]
            left += ["route" for claim in records[RouteClaim].values() if claim.app == user.app]
            left += [f"instance {instance.id}" for instance in everything]
            return [f"{user.app} was deleted, but left {', '.join(left)}"] if left else []
        app: App | None = records[App].get(key)
        status: AppStatus | None = records[AppStatus].get(key)
        if app is None or status is None:
            return [f"{user.app} has no record or no status"]
        reasons = []
        wanted = AppPhase.RUNNING if app.replicas else AppPhase.STOPPED
        if status.phase is not wanted or status.ready != app.replicas or status.updated != app.replicas:
            reasons.append(f"{user.app} wants {app.replicas} and is {status.phase}: {status}")
        current = [i for i in instances if (i.release, i.generation, i.desired) == (app.release, app.generation, Desired.RUN)]
        if len(current) != app.replicas or len(instances) != app.replicas:
            reasons.append(f"{user.app} wants {app.replicas} and has {[(i.id, i.release, i.desired.value) for i in instances]}")
        rested = [self._rests(instance) for instance in standing]
        if not all(rested) or len(rested) != app.standby:
            reasons.append(f"{user.app} has {[i.id for i in standing]} to stand by, at rest {rested}, and wants {app.standby}")
        for ingress in self._world.ingresses:
            routing = ingress.routings.get(key)
            routed = {endpoint.instance for endpoint in routing.endpoints} if routing else set()
            if routed != {i.id for i in current}:
                reasons.append(
                    f"{user.app} is routed to {sorted(routed)} by {ingress.name}, and has {sorted(i.id for i in current)}"
                )
        return reasons

    def _rests(self, instance: Instance) -> bool:
        """Whether what stands by is where it belongs: parked, or awake where that failed, or without a place."""
        if instance.node is None:
            return instance.rejection is not None
        status: Status | None = self._world.rules.records[Status].get(f"{instance.project}/{instance.id}")
        return instance.desired is Desired.RUN and status is not None and (status.parked or status.ready)

    def _leaks(self) -> list[str]:
        records = self._world.rules.records
        reasons = []
        for machine in self._living():
            placed = {i.id: key for key, i in records[Instance].items() if i.node == machine.name}
            live = {id for id, key in placed.items() if not (key in records[Status] and records[Status][key].phase.final)}
            here = {
                "processes": set(machine.host.processes),
                "links": set(machine.links.links),
            }
            for what, found in here.items():
                if found != live:
                    reasons.append(f"{machine.name} has {what} {sorted(found)}, and should have {sorted(live)}")
            recorded = set(machine.disk.record.entries)
            if not live <= recorded <= set(placed):  # an end that a disk forgot is not made again, and not written down again
                reasons.append(f"{machine.name} has recorded {sorted(recorded)}, and should {sorted(placed)}")
        for key in records[Status]:
            if key not in records[Instance]:
                reasons.append(f"the status of {key} was left behind")
        for key in records[Drained]:
            if not any(i.id == key.split("/")[0] for i in records[Instance].values()):
                reasons.append(f"the drained record {key} was left behind")
        return reasons
