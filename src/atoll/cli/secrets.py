"""`atoll secrets`: values that specs name and never hold. A value never stands in an argument, where others could read it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from atoll.cli.session import Session, command, group
from atoll.model.errors import Invalid, NotFound

VALUE_CHARS_MAX = 65_536


@group(example='atoll secrets set db-password < password.txt\n# in atoll.toml:\n[secrets]\nDB_PASSWORD = "db-password"')
def secrets() -> None:
    """Keep values that specs name and never hold."""


@command(
    name="set", example="atoll secrets set db-password          # asks for the value\natoll secrets set tls-key --from-file key.pem"
)
@click.argument("name")
@click.option("--from-file", type=click.Path(path_type=Path), help="Read the value from a file; else from stdin, or ask.")
async def set_secret(session: Session, name: str, from_file: Path | None) -> None:
    """Set a secret, from a file, from stdin, or asked for on a terminal. Running instances keep the old value."""
    value = _value(name, from_file)
    async with session.client() as client:
        view = await client.put_secret(session.project, name, value)
    if session.json:
        session.output.json(view)
    else:
        session.output.say(f"[green]✓[/] {name} is set, version {view.version}; instances that start from now on get it")


def _value(name: str, file: Path | None) -> str:
    if file is not None:
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{file}: no such file") from None
        except OSError as error:
            raise Invalid(f"{file}: {error.strerror}", field="from-file") from None
    elif sys.stdin.isatty():
        return str(click.prompt(f"Value of {name}", hide_input=True, confirmation_prompt=True, err=True))
    else:
        data = sys.stdin.buffer.read(VALUE_CHARS_MAX * 4 + 1)
        data = data.removesuffix(b"\n")  # as `echo` adds it; a file is taken as it is
    try:
        value = data.decode()
    except UnicodeDecodeError:
        raise Invalid("the value is not UTF-8 text", mend="encode it first, e.g. with base64") from None
    if not value:
        raise Invalid("the value is empty", mend="pipe it in, or use --from-file")
    if len(value) > VALUE_CHARS_MAX:
        raise Invalid(f"the value has more than {VALUE_CHARS_MAX} characters")
    return value


@command(name="list", example="atoll secrets list")
async def list_secrets(session: Session) -> None:
    """List the secrets of the project, without their values."""
    from atoll.cli.output import age

    async with session.client() as client:
        views = await client.secrets(session.project)
    if session.json:
        session.output.json(views)
        return
    rows = [(view.name, view.version, age(view.updated_at)) for view in views]
    session.output.table(("SECRET", "VERSION>", "AGE>"), rows, empty=f"no secrets in project '{session.project}'")


@command(example="atoll secrets delete db-password")
@click.argument("name")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
async def delete(session: Session, name: str, yes: bool) -> None:
    """Delete a secret; refused while an app or job names it."""
    from atoll.cli.apps import confirm

    if not yes:
        confirm(f"Delete secret '{name}'?")
    async with session.client() as client:
        await client.delete_secret(session.project, name)
    if session.json:
        session.output.json({"deleted": name})
    else:
        session.output.say(f"[green]✓[/] {name} is deleted")


for _each in (set_secret, list_secrets, delete):
    secrets.add_command(_each)
