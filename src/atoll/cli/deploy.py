"""`atoll deploy`: from a directory to a URL, or to the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command
from atoll.model.errors import Invalid

if TYPE_CHECKING:
    from atoll.model.spec import AppSpec


@command(
    example="atoll deploy examples/hello\natoll deploy -f shop.yaml -p shop\n"
    "atoll deploy --image registry.example/web:1.4 --name web --port 8080",
    fields={"scale": "replicas"},
)
@click.argument("directory", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option(
    "--file", "-f", "file", type=click.Path(path_type=Path), help="The spec: TOML, JSON or YAML.  [default: DIR/atoll.toml]"
)
@click.option("--image", metavar="REF", help="Run this image; build nothing.")
@click.option("--name", metavar="NAME", help="The app's name; else the spec's.")
@click.option("--port", type=click.IntRange(1, 65_535), help="The HTTP port that the app listens on, if the spec has none.")
@click.option("--replicas", type=click.IntRange(min=0), help="How many instances.")
@click.option("--env", "-e", multiple=True, metavar="NAME=VALUE", help="Set a variable (not for secrets).")
@click.option("--detach", "-d", is_flag=True, help="Return when the deployment is accepted; do not follow it.")
async def deploy(
    session: Session,
    directory: Path | None,
    file: Path | None,
    image: str | None,
    name: str | None,
    port: int | None,
    replicas: int | None,
    env: tuple[str, ...],
    detach: bool,
) -> None:
    """Build and run an app, and follow it until it serves; print its URL.

    DIR holds an atoll.toml, and what to build where that has a [build] table. A spec with [[apps]] is several apps, written
    together or not at all, which start in the order of their depends_on. When the new release does not come up,
    this says why, with the last lines of its log, and exits 1; what served before still serves.
    Ctrl-C leaves the deployment running.
    """
    from atoll.cli import apps
    from atoll.cli.execute import variables

    path, data = _read(directory, file, image)
    if "apps" in data:
        from atoll.cli import groups

        if any(value for value in (image, name, port, replicas, env)):
            raise Invalid(f"{path}: several apps, and an option that is for one", mend="write it into the file")
        await groups.deploy(session, data, path or Path(), detach=detach)
        return
    data |= {key: value for key, value in {"image": image, "name": name}.items() if value is not None}
    if session.project_given or "project" not in data:
        data["project"] = session.project
    if port is not None and not data.get("ports"):
        data["ports"] = [{"port": port}]
    if replicas is not None:
        data["scale"] = {"replicas": replicas}
    if env:
        data["env"] = {**data.get("env", {}), **variables(env)}
    spec = spec_of(data, path)
    session.use_project(spec.project)
    async with session.client() as client:
        if spec.build is not None and image is None:
            from msgspec.structs import replace

            from atoll.cli.building import build_and_push

            spec = replace(spec, image=await build_and_push(session, client, spec, (path or Path("atoll.toml")).parent))
        view = await client.put_app(spec)
        await apps.follow(session, client, view, detach=detach)


def _read(directory: Path | None, file: Path | None, image: str | None) -> tuple[Path | None, dict[str, Any]]:
    """Return the spec's path and data; neither is needed when an image is given."""
    from atoll.cli import spec_file
    from atoll.model.errors import NotFound

    if directory is not None and file is not None:
        raise Invalid("both DIR and --file are given", mend="give one of them")
    try:
        path = spec_file.find(file or directory or Path())
    except NotFound:
        if image is None or directory is not None or file is not None:
            raise
        return None, {}
    if directory is None and file is None and image is not None:
        return None, {}  # an atoll.toml that happens to lie here is not what was asked for
    return path, spec_file.read(path)


def spec_of(data: dict[str, Any], path: Path | None) -> AppSpec:
    """Return the app's spec. Raises Invalid, naming file and field, with a mend for what is a job's."""
    from atoll.cli import spec_file
    from atoll.model.spec import AppSpec

    if data.get("kind") == "job":
        raise Invalid(f"{path}: this is a job", field="kind", mend=f"run it: atoll jobs run -f {path}")
    if "name" not in data:
        raise Invalid("name: missing", field="name", mend="pass --name, or write name = '…' in the spec")
    return spec_file.parse(data, AppSpec, path)
