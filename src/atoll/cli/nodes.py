"""`atoll nodes`: the machines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from atoll.cli import draining, names
from atoll.cli.session import Session, command, group
from atoll.model.devices import GpuHealth
from atoll.model.errors import NotFound

if TYPE_CHECKING:
    from atoll.model.views import BrakeView, NodeView
    from atoll.sdk.client import Client


@group(example="atoll nodes\natoll nodes drain node-3 --wait")
def nodes() -> None:
    """Show the machines; label and taint them; take one out of use with cordon or drain."""


@command(name="list", example="atoll nodes list --json\natoll nodes list --where 'rack=a7,arch!=arm64'")
@click.option("--where", metavar="RULES", help="Only those with these labels: label=value or label!=value, with commas.")
async def list_nodes(session: Session, where: str | None) -> None:
    """List the nodes, with what is reserved on each."""
    from atoll.model.evacuation import labels_of
    from atoll.model.maintenance import check_selector, selects

    if where is not None:
        check_selector(where)
    async with session.client() as client:
        views = await client.nodes()
        if where is not None:
            views = [view for view in views if selects(where, labels_of(view.node))]
        braked = await _brake(client) if any(view.health != "ready" for view in views) else None
    if session.json:
        session.output.json(views)
        return
    columns: tuple[str, ...] = ("NODE", "STATE", "INSTANCES>", "CPU", "MEMORY", "GPUS", "SITE?", "REGION?", "VERSION?", "RUNTIMES")
    rows = [_row(view) for view in views]
    if any(view.node.taints for view in views):
        columns = (*columns[:-1], "TAINTS?", columns[-1])
        rows = [(*row[:-1], " ".join(view.node.taints) or "–", row[-1]) for row, view in zip(rows, views, strict=True)]
    if not any(view.node.capacity.gpus for view in views):
        at = columns.index("GPUS")
        columns, rows = columns[:at] + columns[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]
    none = "no nodes; start one: atoll agent, or all: atoll up" if where is None else "no node has these labels"
    session.output.table(columns, rows, empty=none)
    if braked is not None:
        session.output.say(_braked(braked))


async def _brake(client: Client) -> BrakeView | None:
    """Return the brake if it is on; None too for a server that is older than it."""
    try:
        view = await client.brake()
    except NotFound:
        return None
    return view if view.brake is not None else None


def _braked(view: BrakeView) -> str:
    from atoll.cli.output import age

    brake = view.brake
    if brake is None:
        return "[green]✓[/] the brake is not on"
    if view.released:
        return "[green]✓[/] the brake lets go: nodes that do not answer are given up, and what they ran is replaced"
    many = f"{brake.silent} of {brake.nodes} nodes stopped to answer at once, {age(brake.since)} ago"
    return f"[yellow]![/] {many}: none is given up and nothing replaced meanwhile. If they are gone: atoll nodes release-brake"


@command(name="release-brake", example="atoll nodes release-brake")
async def release_brake(session: Session) -> None:
    """Give up nodes that do not answer though they are many.

    When many nodes stop to answer at once, it is mostly the network, and nothing is replaced until they are back or 10 minutes have
    passed. Say this when you know that they are gone.
    """
    async with session.client() as client:
        view = await client.release_brake()
    if session.json:
        session.output.json(view)
    else:
        session.output.say(_braked(view))


def word(view: NodeView) -> str:
    """Return the one word for how a node stands."""
    if view.health != "ready":
        return str(view.health)
    if view.evacuation is not None:
        if view.evacuation.maintenance is not None and view.since_window(time.time()):
            return "maintenance"
        return "draining" if view.instances else "drained"
    return "cordoned" if view.policy is not None and view.policy.cordoned else "ready"


def _note(view: NodeView) -> str:
    """Return what is to be said of a node's state."""
    from atoll.cli.output import age
    from atoll.model.evacuation import in_words

    if view.health != "ready":
        return f"for {age(view.since)}" if view.since else ""
    if view.evacuation is None:
        return view.policy.note if view.policy is not None else ""
    if not view.instances and view.evacuation.maintenance is None:
        return f"it is empty; use it again: atoll nodes undrain {view.node.name}"
    left = f"{view.instances} left; " if view.instances else ""
    if view.evacuation.start is not None and not view.since_window(time.time()):
        return f"{left}{view.evacuation.why}, from {in_words(view.evacuation.start)}"
    return f"{left}{view.evacuation.why}"


def _row(view: NodeView) -> tuple[Any, ...]:
    from atoll.cli import gpus
    from atoll.cli.output import bar, state
    from atoll.model.units import format_bytes

    node = view.node
    return (
        node.name,
        state(word(view), _note(view)),
        view.instances,
        bar(
            view.allocated_cpu_milli,
            node.capacity.cpu_milli,
            f"{view.allocated_cpu_milli / 1000:g}/{node.capacity.cpu_milli / 1000:g}",
        ),
        bar(
            view.allocated_memory_bytes,
            node.capacity.memory_bytes,
            f"{format_bytes(view.allocated_memory_bytes)}/{format_bytes(node.capacity.memory_bytes)}",
        ),
        gpus.count(view) or "–",
        node.site,
        node.region,
        node.version,
        " ".join(node.runtimes) or "–",
    )


@command(example="atoll nodes show node-3")
@names.argument("name", "nodes", metavar="NODE")
async def show(session: Session, name: str) -> None:
    """Show one node, its GPUs with who holds them, and the images that it fetches before they are needed."""
    async with session.client() as client:
        view = await client.node(name)
        progress = await client.drain_of(name) if view.evacuation is not None else None
    if session.json:
        session.output.json(view)
        return
    from rich.table import Table
    from rich.text import Text

    from atoll.cli import gpus
    from atoll.cli.output import age, bar, state
    from atoll.model.units import format_bytes

    node, beat = view.node, view.heartbeat
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    lines: list[tuple[str, Any]] = [
        ("node", node.name),
        ("state", state(word(view), _note(view))),
        ("place", f"site {node.site}, region {node.region}"),
        (
            "cpu",
            bar(
                view.allocated_cpu_milli,
                node.capacity.cpu_milli,
                f"{view.allocated_cpu_milli / 1000:g} of {node.capacity.cpu_milli / 1000:g} cores reserved",
            ),
        ),
        ("memory", f"{format_bytes(view.allocated_memory_bytes)} of {format_bytes(node.capacity.memory_bytes)} reserved"),
        ("disk", format_bytes(node.capacity.disk_bytes)),
        ("gpus", gpus.summary(node.capacity.gpus)),
        ("instances", str(view.instances)),
        ("images", f"{len(beat.images)} here" if beat is not None and beat.images else "none"),
        ("runtimes", ", ".join(node.runtimes) or "none: run `atoll doctor` there"),
        ("labels", ", ".join(f"{key}={value}" for key, value in sorted(node.labels.items())) or "none"),
        ("taints", ", ".join(node.taints) or "none"),
        ("agent", f"{node.version or 'unknown version'}, {node.arch}, registered {age(node.registered_at)} ago"),
        (
            "last sign",
            f"{age(beat.at)} ago, uses {beat.cpu_milli / 1000:.2f} cores, {format_bytes(beat.memory_bytes)}" if beat else "none",
        ),
    ]
    for label, value in lines:
        grid.add_row(label, value)
    session.output.print(grid)
    if view.prefetch:
        session.output.print("")
        session.output.table(("IMAGE FOR LATER", "STATE"), _later(view))
    if progress is not None and progress.items:
        session.output.print("")
        session.output.table(draining.COLUMNS, draining.rows(progress))
    if node.capacity.gpus or view.gpus:
        session.output.print("")
        session.output.table(gpus.COLUMNS, gpus.rows(view))
        for note in gpus.notes(node.capacity):
            session.output.print(Text(note, style="dim"))


def _later(view: NodeView) -> list[tuple[str, str]]:
    """Return a line for each image that the node may need soon, the likeliest first."""
    here = set(view.heartbeat.images) if view.heartbeat is not None else set()
    fetching = view.heartbeat.fetching if view.heartbeat is not None else ""

    def state(reference: str) -> str:
        if reference.partition("@")[2] in here:
            return "here"
        if fetching.partition(" ")[0] == reference:
            return f"fetching {fetching.partition(' ')[2]}".strip()
        return "waits"

    return [(reference, state(reference)) for reference in view.prefetch]


@command(example="atoll nodes cordon node-3")
@names.argument("name", "nodes", metavar="NODE")
async def cordon(session: Session, name: str) -> None:
    """Put nothing new on a node; what runs there stays."""
    async with session.client() as client:
        view = await client.cordon(name)
    _said(session, view, "takes nothing new")


@command(example="atoll nodes uncordon node-3")
@names.argument("name", "nodes", metavar="NODE")
async def uncordon(session: Session, name: str) -> None:
    """Let a node be used again."""
    async with session.client() as client:
        view = await client.uncordon(name)
    _said(session, view, "is used again")


@command(example="atoll nodes label node-3 rack=a7 disk=ssd\natoll nodes label node-3 rack-   # take it away")
@names.argument("name", "nodes", metavar="NODE")
@click.argument("labels", nargs=-1, metavar="KEY=VALUE|KEY-…")
@click.option("--reset", is_flag=True, help="Forget all that was said so before: what its agent was started with counts again.")
async def label(session: Session, name: str, labels: tuple[str, ...], reset: bool) -> None:
    """Say labels of a node, for `placement.constraints`, reservations and maintenance.

    They are kept, whatever becomes of the node's agent, and go before what it was started with (`atoll agent --label`).
    Without any, those that it has are shown.
    """
    from atoll.model.labels import read_label
    from atoll.model.views import LabelRequest

    said: dict[str, str | None] = {}
    for text in labels:
        key, value = (text[:-1], None) if text.endswith("-") and "=" not in text else read_label(text)
        said[key] = value
    wish = LabelRequest(labels=said, reset=reset)
    async with session.client() as client:
        view = await (client.label(name, wish) if labels or reset else client.node(name))
    if session.json:
        session.output.json(view)
        return
    own = view.policy.labels if view.policy is not None else {}
    rows = [(key, value, "operator" if key in own else "its agent") for key, value in sorted(view.node.labels.items())]
    session.output.table(("LABEL", "VALUE", "SAID BY"), rows, empty=f"{name} has no labels but node, site, region and arch")


@command(
    example="atoll nodes taint node-3 gpu=only\natoll nodes taint node-3 spot:prefer-no-schedule\n"
    "atoll nodes taint node-3 gpu-   # take it away"
)
@names.argument("name", "nodes", metavar="NODE")
@click.argument("taints", nargs=-1, metavar="KEY[=VALUE][:EFFECT]|KEY-…")
@click.option("--reset", is_flag=True, help="Forget all that was said so before: what its agent was started with counts again.")
async def taint(session: Session, name: str, taints: tuple[str, ...], reset: bool) -> None:
    """Keep off a node all that does not tolerate it (`placement.tolerations`).

    EFFECT is no-schedule (nothing new, where none is given) or prefer-no-schedule (only what fits nowhere else). What runs there
    stays: `atoll nodes drain` has it leave. Kept as labels are; without any, those that it has are shown.
    """
    from atoll.model.labels import check_taints, is_wish
    from atoll.model.views import TaintRequest

    removed = tuple(text[:-1] for text in taints if text.endswith("-"))
    wish = TaintRequest(add=check_taints(text for text in taints if not text.endswith("-")), remove=removed, reset=reset)
    async with session.client() as client:
        view = await (client.taint(name, wish) if taints or reset else client.node(name))
    if session.json:
        session.output.json(view)
        return
    own = view.policy.taints if view.policy is not None else ()
    rows = [
        (text.removesuffix(":prefer-no-schedule"), _effect(is_wish(text)), "operator" if text in own else "its agent")
        for text in view.node.taints
    ]
    session.output.table(("TAINT", "EFFECT", "SAID BY"), rows, empty=f"{name} has no taints")


def _effect(wish: bool) -> str:
    return "only what fits nowhere else" if wish else "nothing new that does not tolerate it"


@command(example="atoll nodes reinstate node-3 GPU-5f2c1d90 --reset")
@names.argument("name", "nodes", metavar="NODE")
@click.argument("gpu")
@click.option("--reset", is_flag=True, help="Reset the GPU first. Nothing may hold it.")
async def reinstate(session: Session, name: str, gpu: str, reset: bool) -> None:
    """Offer a GPU again that was taken out for an error.

    GPU is its id, or the beginning of one, as `atoll nodes show` has it. Use it when the error is mended and no counter of the
    driver shows that. What the driver still says against the GPU stands.
    """
    async with session.client() as client:
        device = await client.reinstate(name, gpu, reset=reset)
    if session.json:
        session.output.json(device)
        return
    from rich.markup import escape

    from atoll.cli import gpus

    if device.health is GpuHealth.QUARANTINED:
        session.output.say(f"[yellow]![/] {gpus.short(device.id)} of {name} is still {gpus.word(device)}: {escape(device.reason)}")
    else:
        was = "was reset and is" if reset else "is"
        session.output.say(f"[green]✓[/] {gpus.short(device.id)} of {name} {was} offered again")


@command(example="atoll nodes revoke node-3")
@names.argument("name", "nodes", metavar="NODE")
@click.option("--ingress", is_flag=True, help="NODE is the name of an ingress.")
async def revoke(session: Session, name: str, ingress: bool) -> None:
    """Refuse a node's certificate and tokens from now on, at every server, also on streams that are open.

    What runs there goes on there until the node counts as lost, and is replaced then. `atoll join-token create --node NODE` lets
    it in again.
    """
    async with session.client() as client:
        view = await (client.revoke_ingress(name) if ingress else client.revoke_node(name))
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] {name} is refused from now on")


@command(example="atoll nodes remove node-3")
@names.argument("name", "nodes", metavar="NODE")
async def remove(session: Session, name: str) -> None:
    """Forget a node that is lost or revoked, with its certificate and tokens."""
    async with session.client() as client:
        view = await client.remove_node(name)
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] {name} is forgotten")


def _said(session: Session, view: NodeView, what: str) -> None:
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] {view.node.name} {what}")


for _each in (
    list_nodes,
    show,
    draining.drain,
    draining.undrain,
    cordon,
    uncordon,
    label,
    taint,
    release_brake,
    reinstate,
    revoke,
    remove,
):
    nodes.add_command(_each)
