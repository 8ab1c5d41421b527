"""How an image is made from an app's directory."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from atoll.model.names import EnvName, SpecRecord
from atoll.model.spec.values import AbsolutePath, Argument, EnvValue


class Build(SpecRecord, frozen=True, kw_only=True):
    """How to make the image from the app's directory, on a Debian base. Same inputs, same digest."""

    base: Annotated[
        str, Meta(pattern=r"^(debian:[a-z]+|scratch)$(?!\n)", description="'debian:' with the name of a release, or 'scratch'")
    ] = "debian:bookworm"
    """`scratch` is nothing at all: the image has the files and no more, as for a volume or a program that needs no other."""
    apt: tuple[Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+$(?!\n)", description="the name of a Debian package")], ...] = ()
    pip: tuple[
        Annotated[
            str,
            Meta(pattern=r"^[A-Za-z0-9].*$(?!\n)", description="a requirement as pip takes it, such as 'flask>=3'", max_length=256),
        ],
        ...,
    ] = ()
    files: tuple[str, ...] = (".",)
    """Paths below the app's directory that go into the image's `workdir`."""
    ignore: tuple[str, ...] = (
        ".git",
        "__pycache__",
        "*.pyc",
        ".venv",
        "atoll.toml",
        "atoll.*.toml",
        "atoll.yaml",
        "atoll.yml",
        "atoll.json",
    )
    """Names, or paths below the app's directory. The spec is among them: were it in the image, each change of it made a release."""
    workdir: AbsolutePath = "/app"
    command: tuple[Argument, ...] = ()
    user: str | None = None
    env: dict[EnvName, EnvValue] = {}
