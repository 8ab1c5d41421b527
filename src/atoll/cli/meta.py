"""`atoll schema`, `completion` and `version`: about atoll itself."""

from __future__ import annotations

import click

from atoll.cli.session import Session, command
from atoll.model.errors import AtollError


@command(example="atoll schema app > app.schema.json")
@click.argument("kind", type=click.Choice(("app", "job")))
def schema(session: Session, kind: str) -> None:
    """Print the JSON Schema of a spec, for editors and checks. Needs no server."""
    from atoll.model import codec
    from atoll.model.spec import AppSpec, JobSpec

    session.output.json(codec.json_schema(AppSpec if kind == "app" else JobSpec))


@command(example='eval "$(atoll completion bash)"   # in ~/.bashrc')
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(session: Session, shell: str) -> None:
    """Print a script that completes `atoll` in your shell."""
    from click.shell_completion import get_completion_class

    from atoll.cli.main import cli

    made = get_completion_class(shell)
    if made is None:
        raise AtollError(f"no completion for {shell}")
    click.echo(made(cli, {}, "atoll", "_ATOLL_COMPLETE").source())


@command(example="atoll version --json")
async def version(session: Session) -> None:
    """Print the versions of this command and of the server."""
    import platform

    import atoll

    server: dict[str, object] | None = None
    why = ""
    try:
        async with session.client() as client:
            info = await client.info()
        server = {"version": info.version, "cell": info.cell, "store": info.store, "api": session.context.address}
    except AtollError as error:
        why = error.message
    if session.json:
        session.output.json(
            {"client": atoll.__version__, "python": platform.python_version(), "server": server, "error": why or None}
        )
        return
    click.echo(f"client  {atoll.__version__} (Python {platform.python_version()})")
    if server is not None:
        click.echo(f"server  {server['version']} (cell {server['cell']}, store {server['store']}) at {server['api']}")
    else:
        click.echo(f"server  {why}")
