"""The command `fedpress server`: it runs a recipe with clients on other machines."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli.common import (
    LOOPBACK,
    AsJson,
    Device,
    Insecure,
    NetworkFolder,
    Overrides,
    Public,
    exit_stack,
    in_one_line,
    load_data,
    quit_on_term,
    stopping,
    warn,
    with_device,
)
from fedpress.cli.run import show_run

# Only for type checkers: `--help` must not wait for torch and Flower.
if TYPE_CHECKING:
    from rich.console import Console

    from fedpress.api.begin import CheckedRun
    from fedpress.data import FederatedData
    from fedpress.pipeline.recipe import Recipe
    from fedpress.transport.flower import ServerLink


def server(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    overrides: Overrides = None,
    network: NetworkFolder = None,
    public: Public = None,
    min_clients: Annotated[
        int | None, typer.Option(min=1, help="Clients to wait for; by default all known ones.")
    ] = None,
    wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait for them; by default for ever.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; a run that began there is resumed.")
    ] = None,
    insecure: Insecure = False,
    port: Annotated[int, typer.Option(help="With --insecure: the port.")] = 9443,
    lost_after: Annotated[
        float, typer.Option(min=1, help="Seconds after which an offline client counts as lost.")
    ] = 60.0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe with clients on other machines; the same command resumes a stopped run."""
    from fedpress.cli import terminal

    out_stream = terminal.console(quiet=as_json)
    words = with_device(overrides, device)
    with stopping("stopped before the run began; nothing was changed"):
        begun = _begun(recipe, [*words, *public_alone(public)], out)
        loaded = server_data(begun.recipe, out_stream)
        link = _open(network, insecure, port, begun.place, out_stream)
    said = "\nstopped; all rounds so far are saved; the same command goes on"
    with stopping(said), quit_on_term():
        # Closed also after Ctrl-C: closing the link ends the SuperLink, Flower's server process.
        try:
            report_file = _serve(link, begun, loaded, out_stream, min_clients, wait, lost_after)
        finally:
            link.close()
    show_run(begun.place, report_file, out_stream, as_json=as_json)


def _begun(recipe: str, words: list[str], out: Path | None) -> CheckedRun:
    """Checks a new run; if a run has begun in the folder `out`, opens that run to resume it."""
    from fedpress.api import begin

    # There is no flag such as --resume, because a service that is restarted at boot always has the
    # same command.
    if out is not None and (out / "settings.json").exists():
        return begin.checked_resume(out, recipe, words, None, exit_stack)
    return begin.new(recipe, words, None, out)


def public_alone(path: Path | None) -> list[str]:
    """Returns overrides of the recipe for data at `path` that are public as a whole."""
    if path is None:
        return []
    # A data set must have a client, so one client gets a single example. The server drops client
    # and example (`without_clients`); the other rows are public or test rows.
    keys = ["data.num_clients=1", "data.examples_per_client=1", "data.partition.kind=iid"]
    # These keys would divide the rows by client, which has no meaning for public rows.
    keys += ["data.client_column=none", "data.public_clients=[]", "data.test_clients=[]"]
    return [f"data.path={path.resolve()}", *keys]


def server_data(recipe: Recipe, out_stream: Console) -> FederatedData:
    """Loads the server's own data: the public, validation and test parts, without clients."""
    return load_data(recipe, out_stream).without_clients()


def _open(
    folder: Path | None, insecure: bool, port: int, place: Path, out_stream: Console
) -> ServerLink:
    """Starts a SuperLink and connects to it.

    The SuperLink is Flower's server process, to which the clients connect.

    Args:
        folder: the server's folder from `fedpress network init`; None with --insecure.
        insecure: whether to use neither TLS nor keys, on this machine alone.
        port: port with --insecure; else the folder names the port.
        place: the run folder.
        out_stream: where progress is shown.

    Raises:
        NetworkError: if the SuperLink does not start, or if not exactly one of `folder` and
            `insecure` is given.
    """
    from fedpress.cli import terminal
    from fedpress.errors import NetworkError
    from fedpress.network.folders import ServerFolder

    if (folder is None) != insecure:
        raise NetworkError(
            "got both" if insecure else "got none",
            place="network",
            cure="give the folder of the server with --network, or --insecure on this machine",
        )
    with terminal.waiting(out_stream, "starting the SuperLink"):
        from fedpress.transport.flower import Address, ServerLink, SuperLink

        # The SuperLink's files are beside the run folder, because a new run demands that its folder
        # does not exist.
        home = place.with_name(f"{place.name}.superlink")
        if folder is None:
            warn(["--insecure: whoever is on this machine can read and change all messages"])
            address = Address(LOOPBACK, port)
            superlink = SuperLink(address, home)
            return ServerLink(address, superlink.secret, superlink=superlink).open()
        # Read before Flower reads these files: errors of `ServerFolder.read` name the wrong file
        # and a cure, those of Flower do not.
        found = ServerFolder.read(folder)
        # localhost: the server connects to its own SuperLink; clients use the configured name.
        own = found.path
        address = Address("localhost", found.config.port, own / "ca.crt")
        superlink = SuperLink(
            address,
            home,
            bind=found.config.bind,
            certificate=own / "server.crt",
            key=own / "server.key",
        )
        keys = found.config.clients
        return ServerLink(address, superlink.secret, keys=keys, superlink=superlink).open()


def _serve(
    link: ServerLink,
    begun: CheckedRun,
    data: FederatedData,
    out_stream: Console,
    min_clients: int | None,
    wait: float | None,
    lost_after: float,
) -> Path:
    """Waits for the clients, runs all stages, and returns the path of the report.

    Args:
        link: the open connection to the clients.
        begun: the checked run.
        data: the server's own data, without clients.
        out_stream: where progress is shown.
        min_clients: number of clients to wait for; None: all.
        wait: seconds to wait for them; None: without limit.
        lost_after: seconds after which an offline client counts as lost.
    """
    from fedpress.api import progress
    from fedpress.cli import terminal
    from fedpress.network.observed import ObservedLink, hides_cohort
    from fedpress.network.server import ServerNetwork
    from fedpress.pipeline import run as runs
    from fedpress.pipeline.check import check_recipe
    from fedpress.reports.html import write_report

    # Escaped: the sentence may contain text that a client has sent.
    def say(sentence: str) -> None:
        out_stream.print(in_one_line(sentence), markup=False, soft_wrap=True)

    settings = begun.recipe.data
    hidden = hides_cohort(begun.recipe.stage)
    observed = ObservedLink(link, hidden=hidden)
    network = ServerNetwork(
        observed,
        settings.label_columns,
        lost_after,
        say,
        min_clients,
        wait,
        hidden,
        settings.reading,
    )
    # The check asks the clients whether they accept, so they must be connected.
    network.gather()
    with terminal.waiting(out_stream, "checking that everything fits together"):
        check_recipe(begun.recipe, data, network, sizes=False)
    # Created only now, so that no run folder is left behind if the clients do not come.
    folder, notes = begun.start(shlex.join(["fedpress", *sys.argv[1:]]), exit_stack, data)
    warn(notes)
    say(f"{begun.recipe.name} into {begun.place}")
    observed.write_into(begun.place)
    try:
        progress.follow(runs.execute(begun.recipe, folder, data, network=network), out_stream)
    finally:
        observed.close()
    with terminal.waiting(out_stream, "drawing the report"):
        return write_report(begun.place)
