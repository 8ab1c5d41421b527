"""Building an app's image and pushing it to the cell's registry, with what happens shown on stderr."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.cli.session import Session
from atoll.model.errors import DeadlineExceeded, Invalid, Unsupported
from atoll.model.units import format_bytes

if TYPE_CHECKING:
    from atoll.images.build import BuildProgress, Built
    from atoll.images.registry import Registries
    from atoll.model.ports.images import PullProgress
    from atoll.model.spec import Workload
    from atoll.sdk.client import Client

TAG_CHARS = 12
LINE_CHARS = 100


def cache_directory() -> Path:
    """Return where layers are kept between builds: `$XDG_CACHE_HOME/atoll/build`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path(os.environ.get("HOME") or "/root") / ".cache")
    return Path(home) / "atoll" / "build"


async def build_and_push(session: Session, client: Client, spec: Workload, directory: Path) -> str:
    """Return the reference of the image that `spec.build` describes. Asks the API first, since a build may take minutes.

    Raises Invalid or Forbidden for ports that the project may not have, before anything is built.
    """
    from atoll.model.spec import AppSpec

    await client.info()
    if isinstance(spec, AppSpec) and (spec.public_ports() or any(port.host is not None for port in spec.ports)):
        with contextlib.suppress(DeadlineExceeded):
            await client.plan(spec)  # a dry run: where they would go is not asked for
    built = await build_image(session, spec, directory)
    return await push_image(session, built.layout, built.digest, spec.project, spec.name)


async def build_image(session: Session, spec: Workload, directory: Path, *, refresh: bool = False) -> Built:
    """Build, and say so. Raises Invalid for a spec without [build]."""
    from atoll.images.build import build

    if spec.build is None:
        raise Invalid(
            "build: missing; there is nothing to build", field="build", mend="add a [build] table, or deploy with --image"
        )
    if (worker := getattr(spec, "worker", None)) is not None and not (directory / worker.main).is_file():
        raise Invalid(f"worker.main: there is no {worker.main} in {directory}", field="worker.main", mend="check the path")
    with _Steps(session) as steps:
        built = await build(directory, spec.build, cache=cache_directory(), progress=steps.show, refresh=refresh)
    cached = f" [dim](unchanged: {', '.join(built.cached)})[/]" if built.cached else ""
    session.output.say(f"[green]✓[/] built {spec.name} in {built.took_s:.1f} s, {format_bytes(built.size_bytes)}{cached}")
    return built


class _Steps:
    """Shows a build's steps: the line of the moment on a terminal, each step once elsewhere."""

    def __init__(self, session: Session) -> None:
        self._output = session.output
        self._status = session.output.err.status("building") if session.output.err.is_terminal else None
        self._step = ""

    def __enter__(self) -> _Steps:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, progress: BuildProgress) -> None:
        from rich.markup import escape

        text = escape(progress.text[:LINE_CHARS])
        if self._status is not None:
            self._status.update(f"build {progress.step}: [dim]{text}[/]")
        elif progress.step != self._step and progress.step != "image":
            self._output.say(f"build {progress.step}: {text}")
        self._step = progress.step


async def push_image(session: Session, layout: Path, digest: str, project: str, name: str, *, tag: str | None = None) -> str:
    """Push an image of a layout to the cell's own registry and return its reference with the digest."""
    from atoll.images.push import push
    from atoll.images.reference import CELL_HOST

    target = f"{CELL_HOST}/{project}/{name}:{tag or digest.removeprefix('sha256:')[:TAG_CHARS]}"
    async with registries(session) as found:
        with _Bar(session, f"push {name}") as bar:
            pushed = await push(found, layout, digest, target, progress=bar.show)
    session.output.say(f"[green]✓[/] pushed {target}" + (f" [dim]({format_bytes(bar.total)})[/]" if bar.total else ""))
    return pushed


@contextlib.asynccontextmanager
async def registries(session: Session) -> AsyncIterator[Registries]:
    """Yield the way to the cell's registry, which is part of the API."""
    from atoll.images.auth import Access
    from atoll.images.reference import CELL_HOST
    from atoll.images.registry import Registries
    from atoll.sdk.http import pinned

    address = session.context.address.split(",")[0].strip()
    if not address.startswith(("http://", "https://")):
        raise Unsupported(f"images cannot be pushed through {address}", mend="name the API by http:// or https://")
    ca = await pinned(session.context.address, session.context.ca) if address.startswith("https://") else None
    access = Access(url=address, token=session.context.token or "", insecure=True, ca=ca or "")
    found = Registries({CELL_HOST: access})
    try:
        yield found
    finally:
        await found.aclose()


class _Bar:
    """A progress bar on a terminal; nothing elsewhere."""

    def __init__(self, session: Session, what: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self.total = 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), DownloadColumn(), TransferSpeedColumn())
        console = session.output.err
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, progress: PullProgress) -> None:
        self.total = progress.total_bytes
        self._progress.update(self._task, completed=progress.done_bytes, total=progress.total_bytes)
