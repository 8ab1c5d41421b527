"""`atoll build` and `atoll image`: images of the cell's own registry."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atoll.cli.session import Session, command, group
from atoll.cli.untar import unpack
from atoll.model.errors import AtollError, ImageError, NotFound

if TYPE_CHECKING:
    from atoll.model.spec import Workload


@command(example="atoll build examples/hello\natoll build --refresh   # with the packages of today")
@click.argument("directory", type=click.Path(path_type=Path), required=False, metavar="[DIR]")
@click.option(
    "--file", "-f", "file", type=click.Path(path_type=Path), help="The spec: TOML, JSON or YAML.  [default: DIR/atoll.toml]"
)
@click.option("--name", metavar="NAME", help="The app's name; else the spec's.")
@click.option("--tag", metavar="TAG", help="Its tag in the registry.  [default: the beginning of its digest]")
@click.option("--refresh", is_flag=True, help="Fetch packages anew, even if nothing has changed here.")
@click.option("--no-push", is_flag=True, help="Only build; needs no server.")
async def build(
    session: Session, directory: Path | None, file: Path | None, name: str | None, tag: str | None, refresh: bool, no_push: bool
) -> None:
    """Build an app's image and push it to the cell's registry; print its reference, for `atoll deploy --image`.

    An image of nothing but files (base = "scratch"), such as a model's weights, is shown by an app as a volume.
    """
    from atoll.cli import spec_file
    from atoll.cli.building import build_image, push_image
    from atoll.cli.deploy import spec_of

    path = spec_file.find(file or directory or Path())
    data = spec_file.read(path)
    if name is not None:
        data["name"] = name
    if session.project_given or "project" not in data:
        data["project"] = session.project
    spec = spec_of(data, path)
    if not no_push:
        async with session.client() as client:
            await client.info()
    built = await build_image(session, spec, directory or path.parent, refresh=refresh)
    image = None if no_push else await push_image(session, built.layout, built.digest, spec.project, spec.name, tag=tag)
    if session.json:
        session.output.json(
            {
                "image": image,
                "digest": built.digest,
                "size_bytes": built.size_bytes,
                "took_s": round(built.took_s, 3),
                "unchanged": built.cached,
                "layout": str(built.layout),
            }
        )
    else:
        click.echo(image or built.digest)


@group(example="atoll image import web.tar --name web\natoll image list")
def image() -> None:
    """Import and list images of the cell's own registry."""


@command(name="import", example="docker save web:1 | gzip > web.tar.gz\natoll image import web.tar.gz --name web --tag 1")
@click.argument("source", type=click.Path(path_type=Path), metavar="DIR|TAR")
@click.option("--name", metavar="NAME", required=True, help="What it is called in the project.")
@click.option("--tag", metavar="TAG", default="latest", show_default=True)
@click.option("--image", "inner", metavar="NAME", help="Which image, where SOURCE holds several.")
async def import_image(session: Session, source: Path, name: str, tag: str, inner: str | None) -> None:
    """Push an OCI image layout (a directory or its tar) or what `docker save` wrote to the cell's registry."""
    from atoll.cli.building import push_image
    from atoll.images.archive import as_layout

    if not source.exists():
        raise NotFound(f"{source}: no such file or directory")
    with tempfile.TemporaryDirectory(prefix="atoll-import-") as scratch:
        unpacked = source if source.is_dir() else _unpacked(source, Path(scratch) / "archive")
        layout, digest = await as_layout(unpacked, Path(scratch) / "layout", name=inner)
        pushed = await push_image(session, layout, digest, session.project, name, tag=tag)
    if session.json:
        session.output.json({"image": pushed, "digest": digest})
    else:
        click.echo(pushed)


def _unpacked(source: Path, target: Path) -> Path:
    target.mkdir()
    try:
        with tarfile.open(source) as archive:
            unpack(archive, target)
    except (tarfile.TarError, OSError) as error:
        raise ImageError(
            f"{source} is not a tar file: {str(error).partition(':')[0]}", mend="give an OCI layout, or what `docker save` wrote"
        ) from None
    return target


@command(name="list", example="atoll image list")
async def list_images(session: Session) -> None:
    """List the images that the project's apps and jobs run, with the tags that name them: NAME:TAG stands for the image in a
    spec, and with --image."""
    async with session.client() as client:
        apps = await client.apps(session.project)
        jobs = await client.jobs(session.project)
    used: dict[str, list[str]] = {}
    specs: list[tuple[str, Workload]] = [(view.app.name, view.app.spec) for view in apps]
    specs += [(f"job {view.job.name}", view.job.spec) for view in jobs]
    for name, spec in specs:
        used.setdefault(spec.image or "–", []).append(name)
        for volume in spec.volumes:
            if volume.image is not None:
                used.setdefault(volume.image, []).append(f"{name} (volume {volume.name})")
    tags = await _tags(session, used)
    if session.json:
        session.output.json([{"image": image, "tags": tags.get(image, ()), "used_by": by} for image, by in sorted(used.items())])
        return
    rows = [(", ".join(by), ", ".join(tags.get(image, ())) or "–", image) for image, by in sorted(used.items())]
    session.output.table(("USED BY", "TAGS", "IMAGE"), rows, empty=f"project '{session.project}' runs no image")


async def _tags(session: Session, images: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return image → its tags: the one that it names, else what the cell's registry says of its digest."""
    from atoll.cli.building import registries
    from atoll.images.reference import CELL_HOST, parse
    from atoll.images.tags import tags_of

    found: dict[str, tuple[str, ...]] = {}
    unnamed: dict[str, dict[str, str]] = {}
    for image in images:
        try:
            reference = parse(image)
        except ImageError:
            continue  # none, or of a registry that only the nodes know
        if reference.tag is not None:
            found[image] = (reference.tag,)
        elif reference.host == CELL_HOST and reference.digest is not None:
            unnamed.setdefault(reference.repository, {})[reference.digest] = image
    if not unnamed:
        return found
    with contextlib.suppress(AtollError):  # what runs is told without them, too
        async with registries(session) as known:
            for repository, by_digest in unnamed.items():
                named = await tags_of(known, f"{CELL_HOST}/{repository}", by_digest)
                found |= {by_digest[digest]: tags for digest, tags in named.items()}
    return found


for _each in (import_image, list_images):
    image.add_command(_each)
