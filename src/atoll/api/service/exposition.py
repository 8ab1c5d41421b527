"""What the cell knows of its nodes, devices, apps and instances, for Prometheus (text format 0.0.4)."""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Mapping

from atoll.api.service.access import Caller
from atoll.api.service.context import Context
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.traffic import Traffic
from atoll.model.devices import GpuHealth
from atoll.model.records import (
    App,
    AppStatus,
    Heartbeat,
    Ingress,
    Instance,
    Node,
    NodeHealth,
    NodeLiveness,
    NodePolicy,
    OwnerKind,
    Status,
    Usage,
)
from atoll.model.traffic import Counts, Load
from atoll.store.index import by_project

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
INSTANCES_MAX = 10_000
"""Instances in one answer; `atoll_instances_left_out` says how many there are beyond."""
RECORDS_PER_TURN = 1_000
"""Records that are written before the event loop gets its turn."""
FRESH_S = 45.0
"""What a node said longer ago is left out: a figure that stands still is worse than none."""

FAMILIES = {
    "atoll_node_health": ("gauge", "1 for how the node stands, 0 for the others."),
    "atoll_node_cordoned": ("gauge", "1 where nothing new is placed, by an operator's wish."),
    "atoll_node_cpu_cores": ("gauge", "Cores in use on the whole machine."),
    "atoll_node_cpu_capacity_cores": ("gauge", "Cores that instances may have."),
    "atoll_node_memory_bytes": ("gauge", "Memory in use on the whole machine."),
    "atoll_node_memory_capacity_bytes": ("gauge", "Memory that instances may have."),
    "atoll_gpu_health": ("gauge", "1 for how the device stands, 0 for the others."),
    "atoll_gpu_busy_ratio": ("gauge", "Share of the time in which something ran on the device."),
    "atoll_gpu_memory_bytes": ("gauge", "Device memory in use."),
    "atoll_gpu_memory_capacity_bytes": ("gauge", "Device memory in all."),
    "atoll_gpu_power_watts": ("gauge", "What the device draws."),
    "atoll_gpu_temperature_celsius": ("gauge", "How warm the device is."),
    "atoll_app_replicas_wanted": ("gauge", "Instances that there should be."),
    "atoll_app_replicas_ready": ("gauge", "Instances that serve."),
    "atoll_app_parked": ("gauge", "Instances that stand by, parked; they are not among those that are wanted or ready."),
    "atoll_app_replicas_most": ("gauge", "The most that its metric may ask for, of an app that scales by one."),
    "atoll_app_requests_total": ("counter", "Requests to the release that were answered, as ingresses counted them."),
    "atoll_app_errors_total": ("counter", "Of them those answered with 500 to 599."),
    "atoll_ingress_requests_total": ("counter", "Requests to the release that were answered at the ingress, since it was started."),
    "atoll_ingress_errors_total": ("counter", "Of them those answered with 500 to 599."),
    "atoll_ingress_request_seconds_total": (
        "counter",
        "Seconds that requests were under way at the ingress, added up, of an app that scales by its requests.",
    ),
    "atoll_app_latency_seconds": ("gauge", "Within it so large a share of its requests of the last minute were answered."),
    "atoll_app_weight_ratio": ("gauge", "Share of the app's requests that the release is given, while it is not by instances."),
    "atoll_instance_ready": ("gauge", "1 where the instance serves."),
    "atoll_instance_restarts_total": ("counter", "Starts of its process after the first."),
    "atoll_instance_cpu_cores": ("gauge", "Cores in use."),
    "atoll_instance_memory_bytes": ("gauge", "Memory in use."),
    "atoll_instance_gpu_busy_devices": ("gauge", "Devices in use, in parts, of those that are the instance's alone."),
    "atoll_instance_gpu_memory_bytes": ("gauge", "Device memory in use, over all its devices."),
    "atoll_app_metric": ("gauge", "What the instance says of itself: the metrics that its spec names."),
    "atoll_instances_left_out": ("gauge", "Instances beyond what one answer holds."),
}
"""Name → type and what it is."""

Labels = str
"""As they stand between the braces: put together once for all the lines of a record, of which there are many."""


class Exposition:
    def __init__(self, context: Context, heartbeats: Heartbeats, traffic: Traffic, instances_max: int = INSTANCES_MAX) -> None:
        self.instances_max = instances_max
        self._traffic = traffic
        self._context = context
        self._state = context.state
        self._heartbeats = heartbeats
        self.loads: Mapping[str, Mapping[str, Load]] = {}
        """Ingress → app → its load, of apps that scale by their requests; set by whoever takes it."""

    async def text(self, caller: Caller, project: str | None = None) -> bytes:
        """Return all that `caller` may see, or of it one project's apps and instances beside the nodes."""
        page = _Page()
        beats = self._fresh()
        for node, held in sorted(self._state.records(Node).items()):
            self._node(page, held.record, beats.get(node))
            await page.turn()
        seen = [key for key, held in self._state.records(App).items() if _shown(held.record.project, caller, project)]
        counted = self._traffic.by_ingress()
        for key in sorted(seen):
            if (app := self._state.get(App, key)) is not None:  # it may have gone while others had their turn
                self._app(page, key, app.record)
                self._at_ingresses(page, app.record, counted.get(key, {}))
            await page.turn()
        instances = self._state.records(Instance) if project is None else self._state.found(Instance, by_project, project)
        seen = [key for key, held in instances.items() if _shown(held.record.project, caller, project)]
        page.add("atoll_instances_left_out", "", max(0, len(seen) - self.instances_max))
        for key in heapq.nsmallest(self.instances_max, seen):
            if (instance := self._state.get(Instance, key)) is not None:
                self._instance(page, key, instance.record, _used(beats.get(instance.record.node or ""), instance.record.id))
            await page.turn()
        return page.text()

    def _fresh(self) -> dict[str, Heartbeat]:
        now, said = self._context.clock.monotonic(), self._heartbeats.last_said()
        return {node: beat for node, beat in self._heartbeats.all().items() if now - said.get(node, 0.0) <= FRESH_S}

    def _node(self, page: _Page, node: Node, beat: Heartbeat | None) -> None:
        labels = labelled(node=node.name, site=node.site, region=node.region)
        liveness = self._state.get(NodeLiveness, node.name)
        health = liveness.record.health if liveness is not None else NodeHealth.READY
        page.states("atoll_node_health", labels, health, NodeHealth)
        policy = self._state.get(NodePolicy, node.name)
        page.add("atoll_node_cordoned", labels, int(policy is not None and policy.record.cordoned))
        page.add("atoll_node_cpu_capacity_cores", labels, node.capacity.cpu_milli / 1000)
        page.add("atoll_node_memory_capacity_bytes", labels, node.capacity.memory_bytes)
        if beat is not None:
            page.add("atoll_node_cpu_cores", labels, beat.cpu_milli / 1000)
            page.add("atoll_node_memory_bytes", labels, beat.memory_bytes)
        samples = {sample.device: sample for sample in beat.gpus} if beat is not None else {}
        for device in node.capacity.gpus:
            named = labelled(node=node.name, device=device.id, model=device.model)
            page.states("atoll_gpu_health", named, device.health, GpuHealth)
            page.add("atoll_gpu_memory_capacity_bytes", named, device.memory_bytes)
            if (sample := samples.get(device.id)) is None:
                continue
            page.add("atoll_gpu_busy_ratio", named, sample.busy_milli / 1000)
            page.add("atoll_gpu_memory_bytes", named, sample.memory_bytes)
            if sample.power_milliwatts:
                page.add("atoll_gpu_power_watts", named, sample.power_milliwatts / 1000)
            if sample.temperature_c:
                page.add("atoll_gpu_temperature_celsius", named, sample.temperature_c)

    def _app(self, page: _Page, key: str, app: App) -> None:
        labels = labelled(project=app.project, app=app.name)
        held = self._state.get(AppStatus, key)
        status = held.record if held is not None else None
        page.add("atoll_app_replicas_wanted", labels, 0 if app.deleting else app.wanted(status))
        page.add("atoll_app_replicas_ready", labels, status.ready if status is not None else 0)
        page.add("atoll_app_parked", labels, status.parked if status is not None else 0)
        if app.most is not None:
            page.add("atoll_app_replicas_most", labels, app.most)
        rollout = status.rollout if status is not None else None
        for release, weight in sorted(rollout.weights.items() if rollout is not None else ()):
            page.add("atoll_app_weight_ratio", more(labels, release=str(release)), weight / 100)
        for release, counts in sorted(self._traffic.totals().get(key, {}).items()):
            named = more(labels, release=str(release))
            page.add("atoll_app_requests_total", named, counts.requests)
            page.add("atoll_app_errors_total", named, counts.errors)
        for release, (counts, _) in sorted(self._traffic.recent(key).items()):
            for share in (0.5, 0.99):
                value = counts.quantile_s(share)
                if value is not None:
                    page.add("atoll_app_latency_seconds", more(labels, release=str(release), quantile=str(share)), value)

    def _at_ingresses(self, page: _Page, app: App, counted: Mapping[str, Mapping[int, Counts]]) -> None:
        for name, releases in sorted(counted.items()):
            ingress = self._state.get(Ingress, name)
            site = ingress.record.site if ingress is not None else ""
            for release, counts in sorted(releases.items()):
                labels = labelled(project=app.project, app=app.name, release=str(release), ingress=name, site=site)
                page.add("atoll_ingress_requests_total", labels, counts.requests)
                page.add("atoll_ingress_errors_total", labels, counts.errors)
        for name, loads in sorted(self.loads.items()):
            load, ingress = loads.get(f"{app.project}/{app.name}"), self._state.get(Ingress, name)
            if load is not None and ingress is not None:
                labels = labelled(project=app.project, app=app.name, ingress=name, site=ingress.record.site)
                page.add("atoll_ingress_request_seconds_total", labels, load.request_s)

    def _instance(self, page: _Page, key: str, instance: Instance, usage: Usage | None) -> None:
        owner = "app" if instance.owner_kind is OwnerKind.APP else "job"
        labels = labelled(
            **{"project": instance.project, owner: instance.owner, "instance": instance.id, "node": instance.node or ""}
        )
        held = self._state.get(Status, key)
        page.add("atoll_instance_ready", labels, int(held is not None and held.record.ready and not instance.standby))
        page.add("atoll_instance_restarts_total", labels, held.record.restarts if held is not None else 0)
        if usage is None:
            return
        page.add("atoll_instance_cpu_cores", labels, usage.cpu_milli / 1000)
        page.add("atoll_instance_memory_bytes", labels, usage.memory_bytes)
        if instance.gpus and not usage.gpu_silent:
            page.add("atoll_instance_gpu_busy_devices", labels, usage.gpu_milli / 1000)
            page.add("atoll_instance_gpu_memory_bytes", labels, usage.gpu_memory_bytes)
        for name, value in sorted(usage.metrics.items()):
            page.add("atoll_app_metric", more(labels, name=name), value)


class _Page:
    """Lines by family, since a family's lines must stand together."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, list[str]] = defaultdict(list)
        self._records = 0

    async def turn(self) -> None:
        """Give way to others now and then."""
        self._records += 1
        if self._records % RECORDS_PER_TURN == 0:
            await asyncio.sleep(0)

    def add(self, family: str, labels: Labels, value: float) -> None:
        self._lines[family].append(f"{family}{{{labels}}} {value!r}" if labels else f"{family} {value!r}")

    def states(self, family: str, labels: Labels, state: NodeHealth | GpuHealth, kind: type[NodeHealth] | type[GpuHealth]) -> None:
        for each in kind:
            self.add(family, f'{labels},health="{each.value}"', int(each is state))

    def text(self) -> bytes:
        parts = []
        for name, (kind, words) in FAMILIES.items():
            if name in self._lines:
                parts += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", *self._lines[name]]
        return ("\n".join(parts) + "\n").encode()


def _used(beat: Heartbeat | None, instance: str) -> Usage | None:
    """Return what its node says of an instance: looked for where it is shown, as of all 100,000 only few are."""
    return next((usage for usage in beat.usage if usage.instance == instance), None) if beat is not None else None


def _shown(owner: str, caller: Caller, project: str | None) -> bool:
    return caller.sees(owner) and project in (None, owner)


def labelled(**labels: str) -> Labels:
    return ",".join(f'{name}="{escape(text)}"' for name, text in labels.items())


def more(labels: Labels, **others: str) -> Labels:
    return f"{labels},{labelled(**others)}"


def escape(text: str) -> str:
    """Return a label's value as it stands between quotes."""
    if "\\" not in text and '"' not in text and "\n" not in text:
        return text
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
