"""The commands `fedpress network init`, `add`, `renew` and `split`: keys, folders and data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli import client, server
from fedpress.cli.common import (
    Overrides,
    load_data,
)

# Only for type checkers: `--help` must not wait for torch and Flower.
if TYPE_CHECKING:
    pass


network_app = typer.Typer(no_args_is_help=True, help="Make keys and folders for a deployment.")


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of a deployment to `app`."""
    app.add_typer(network_app, name="network")
    app.command()(server.server)
    app.add_typer(client.client_app, name="client")


@network_app.command()
def init(
    host: Annotated[str, typer.Option(help="Name or address by which clients reach the server.")],
    clients: Annotated[str, typer.Option(help="How many clients, or their names: a,b,c.")],
    port: Annotated[int, typer.Option(help="Port of the server; it needs no other.")] = 9443,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("network"),
) -> None:
    """Makes a folder with certificates, keys and configuration for a server and its clients."""
    # Here and below: imported inside the command, so that other commands start fast.
    from fedpress.network import folders

    # Names are made here, so that the messages below can list them.
    names = _names(clients)
    folders.init(out, names, host, port)
    typer.echo(f"made {out}:")
    typer.echo(f"  {out / 'server'}: copy it to {host}; open port {port} there")
    for name in names:
        typer.echo(f"  {out / 'clients' / name}: copy it to the machine of {name}")
    typer.echo(f"  {out / 'authority'}: keep it off line; it signs certificates")
    typer.echo("then, on the server:  fedpress server RECIPE --network server")
    typer.echo(f"and on each client:   fedpress client --network {names[0]} --data PATH")


@network_app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the new client.")],
    network: Annotated[Path, typer.Option(help="Folder that init has made.")] = Path("network"),
) -> None:
    """Adds a client to a network: makes its folder, and adds its key to the server's list."""
    from fedpress.network import folders

    folders.add(network, name)
    # The server reads server.toml when it starts, so it must be started again.
    typer.echo(f"copy {network / 'clients' / name} to its machine,")
    typer.echo(f"and {network / 'server' / 'server.toml'} to the server; then restart the server")


@network_app.command()
def renew(
    network: Annotated[Path, typer.Option(help="Folder that init has made.")] = Path("network"),
) -> None:
    """Makes a new key and certificate for the server, to replace a certificate that expires."""
    from fedpress.network import folders

    folders.renew(network)
    typer.echo(f"copy server.crt and server.key from {network / 'server'} to the server")


@network_app.command()
def split(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder to make.")] = Path("clients"),
) -> None:
    """Writes the examples of each simulated client to its own file, to try out a deployment."""
    from fedpress.api import begin
    from fedpress.cli import terminal
    from fedpress.errors import NetworkError
    from fedpress.network.data import write_arrays

    # Files of an earlier split with more clients would be mixed with the new ones.
    if out.exists():
        raise NetworkError("it exists already", place=str(out), cure="give another one with --out")
    loaded = load_data(begin.load(recipe, overrides or ())[1], terminal.console(quiet=False))
    if loaded.awaits_statistics:
        raise NetworkError(
            "the clients' examples follow from the answer of the first stage's query, which each "
            "client applies to its own rows",
            place="recipe.data.statistics",
            cure="give each client its rows as a file, with fedpress client --data",
        )
    out.mkdir(parents=True)
    for name, arrays in loaded.clients.items():
        write_arrays(out / f"{name}.safetensors", arrays)
        typer.echo(f"{out / name}.safetensors: {len(arrays)} examples")


def _names(clients: str) -> list[str]:
    """Returns the names in `a,b,c`; for a number such as `2` returns client-1 and client-2."""
    if clients.isdecimal():
        return [f"client-{at}" for at in range(1, int(clients) + 1)]
    return [name for name in clients.split(",") if name]
