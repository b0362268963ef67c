"""The commands for clients on other machines: `network` (makes keys), `server` and `client`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli.common import (
    AsJson,
    Device,
    Overrides,
    exit_stack,
    in_one_line,
    load_data,
    stopping,
    warn,
    with_device,
)
from fedpress.cli.run import show_run

# Only for type checkers: `--help` must not wait for torch and Flower.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from rich.console import Console

    from fedpress.api.begin import CheckedRun
    from fedpress.data import FederatedData
    from fedpress.network.gate import Gate
    from fedpress.transport.flower import Address, ServerLink

network_app = typer.Typer(no_args_is_help=True, help="Make keys and folders for a deployment.")
client_app = typer.Typer(
    invoke_without_command=True, help="Take part with the data of this machine, until stopped."
)
Folder = Annotated[
    Path | None,
    typer.Option("--network", help="This machine's folder, made by fedpress network init."),
]
Ledger = Annotated[
    Path | None, typer.Option(help="The owner's ledger; by default one for this user.")
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="No TLS and no keys: on this machine alone, to try it out."),
]
LOOPBACK = "127.0.0.1"
"""Address that only programs on this machine can reach."""


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this file to `app`."""
    app.add_typer(network_app, name="network")
    app.command()(server)
    app.add_typer(client_app, name="client")


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
    out.mkdir(parents=True)
    for name, arrays in loaded.clients.items():
        write_arrays(out / f"{name}.safetensors", arrays)
        typer.echo(f"{out / name}.safetensors: {len(arrays)} examples")


def _names(clients: str) -> list[str]:
    """Returns the names in `a,b,c`; for a number such as `2` returns client-1 and client-2."""
    if clients.isdecimal():
        return [f"client-{at}" for at in range(1, int(clients) + 1)]
    return [name for name in clients.split(",") if name]


def server(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    overrides: Overrides = None,
    network: Folder = None,
    public: Annotated[
        Path | None,
        typer.Option(help="File or folder with public rows alone; sets data.path."),
    ] = None,
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
        # The clients have their own examples. The server keeps its public and test data only.
        loaded = load_data(begun.recipe, out_stream).without_clients()
        link = _open(network, insecure, port, begun.place, out_stream)
    said = "\nstopped; all rounds so far are saved; the same command goes on"
    with stopping(said), _quit_on_term():
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

    labels = begun.recipe.data.label_columns
    observed = ObservedLink(link, hidden=hides_cohort(begun.recipe.stage))
    network = ServerNetwork(observed, labels, lost_after, say, min_clients, wait)
    # The check asks the clients whether they accept, so they must be connected.
    network.gather()
    with terminal.waiting(out_stream, "checking that everything fits together"):
        check_recipe(begun.recipe, data, network)
    # Created only now, so that no run folder is left behind if the clients do not come.
    folder, notes = begun.start(shlex.join(["fedpress", *sys.argv[1:]]), exit_stack)
    warn(notes)
    say(f"{begun.recipe.name} into {begun.place}")
    observed.write_into(begun.place)
    try:
        progress.follow(runs.execute(begun.recipe, folder, data, network=network), out_stream)
    finally:
        observed.close()
    with terminal.waiting(out_stream, "drawing the report"):
        return write_report(begun.place)


@client_app.callback()
def client(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="This client's examples: .safetensors or .npz with x and y, .csv, .parquet, or a "
            "folder label/image.png.",
        ),
    ] = None,
    network: Folder = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="File with what the data's owner allows; default: policy.toml in --network."
        ),
    ] = None,
    ledger: Ledger = None,
    program: Annotated[
        Path | None,
        typer.Option(help="An exported training program (.pte) to train with instead of torch."),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Only check that the data fit this recipe; connects to nobody."
        ),
    ] = None,
    insecure: Insecure = False,
    to: Annotated[
        str | None, typer.Option("--server", help="With --insecure: host:port of the server.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="With --insecure: name of this client.")] = None,
    device: Device = None,
) -> None:
    """Takes part with the data of this machine, until it is stopped."""
    from fedpress.errors import NetworkError

    # typer calls this function also before `client approve` and `client status`.
    if context.invoked_subcommand is not None:
        return
    if data is None:
        raise NetworkError("got none", place="data", cure="give --data PATH")
    if check is not None:
        from fedpress.api.deployment import check_client

        typer.echo(check_client(check, data))
        return
    if (network is None) != insecure:
        raise NetworkError(
            "got both" if insecure else "got none",
            place="network",
            cure="give the folder of this client with --network, or --insecure on this machine",
        )
    with stopping("stopped; state and ledger are kept, the same command goes on"), _quit_on_term():
        _take_part(_who(network, to, name), data, policy, ledger, program, device)


@contextmanager
def _quit_on_term() -> Iterator[None]:
    """Inside the block, SIGTERM ends the command as Ctrl-C does.

    systemd and Docker send SIGTERM to stop a process. By default Python would then end at once,
    without closing the connection.
    """
    import signal

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _Who:
    """Identity of this client, and address of its server.

    Attributes:
        name: name of the client.
        place: the client's folder, for its state.
        address: address and certificate of the server.
        key: private key by which the server recognises this client; None with --insecure.
        threads: number of threads that torch uses.
    """

    name: str
    place: Path
    address: Address
    key: ec.EllipticCurvePrivateKey | None
    threads: int


def _who(folder: Path | None, to: str | None, name: str | None) -> _Who:
    """Reads the client's folder; with --insecure, uses the options `--server` and `--name`.

    Args:
        folder: the client's folder; None with --insecure.
        to: address of the server with --insecure.
        name: name of the client with --insecure.

    Raises:
        NetworkError: if a file or an option is missing, or if --insecure is used for a server on
            another machine.
    """
    from fedpress.errors import NetworkError
    from fedpress.network import keys
    from fedpress.network.folders import ClientFolder, host_and_port
    from fedpress.transport.flower import Address

    if folder is not None:
        found = ClientFolder.read(folder)
        place = found.path
        address = Address(*host_and_port(found.config.server), place / "ca.crt")
        key = keys.read_node_key(place / "node.key")
        return _Who(found.config.name, place, address, key, found.config.threads)
    if name is None:
        raise NetworkError("got none", place="name", cure="give --name, such as --name a")
    address = Address(*host_and_port(to or f"{LOOPBACK}:9443"))
    # Without TLS everybody on the way could read and change the updates.
    if address.host not in (LOOPBACK, "localhost", "::1"):
        raise NetworkError(
            f"--insecure is for this machine alone, not for {address.host}",
            place="server",
            cure="make keys with fedpress network init, and give --network",
        )
    # The client's state is kept also with --insecure, so that the client can be started again.
    place = Path(f"client-{name}")
    place.mkdir(exist_ok=True)
    return _Who(name, place, address, None, 1)


def _gate(who: _Who, data: Path, policy: Path | None, ledger: Path | None) -> Gate:
    """Returns the gate, which decides by the owner's policy whether a request is answered.

    The policy is the file `policy`, else `policy.toml` in the client's folder, else the default
    policy. Only with --insecure a missing policy means that everything is allowed.
    """
    from fedpress.network.gate import NoPolicy
    from fedpress.network.owner import OwnerGate

    beside = who.place / "policy.toml"
    if policy is None and beside.is_file():
        policy = beside
    if policy is None and who.address.ca is None:
        warn(["no policy: this client answers everything; give --policy FILE"])
        return NoPolicy()
    return OwnerGate.open(data, policy=policy, ledger=ledger, certificate=who.address.ca)


def _take_part(
    who: _Who,
    data: Path,
    policy: Path | None,
    ledger: Path | None,
    program: Path | None,
    device: str | None,
) -> None:
    """Connects to the server, and answers its calls until the process is stopped.

    Args:
        who: the client and its server.
        data: file or folder of the client's data.
        policy: file with the owner's policy; None: see `_gate`.
        ledger: file of the owner's ledger; None: the ledger of this user.
        program: an exported training program that replaces torch; None: torch trains.
        device: where to train; None: on the CPU.
    """
    import torch

    from fedpress.network import keys
    from fedpress.network.client import serve
    from fedpress.network.data import ClientData
    from fedpress.network.identities import FILE, KnownIdentities
    from fedpress.network.node import Correspondence
    from fedpress.network.sessions import Sessions
    from fedpress.training.device import find
    from fedpress.transport.flower import NodeLink
    from fedpress.workspace import lock

    own = ClientData(data)
    # Two processes with one folder would answer the same calls, and disturb each other's state.
    exit_stack.enter_context(lock.locked(who.place))
    # The number of threads is fixed, because it decides in which order floats are added up, and so
    # how they are rounded. A client that is started again must compute the same bits.
    torch.set_num_threads(who.threads)
    sessions = Sessions(
        who.name,
        who.place / "sessions",
        own.arrays,
        _gate(who, data, policy, ledger),
        keys.identity_of(who.place),
        KnownIdentities(who.place / FILE, who.name),
        program,
        find(device or "cpu"),
    )

    # Escaped: the sentence may contain text that the server has sent.
    def say(sentence: str) -> None:
        typer.echo(f"{who.name}: {in_one_line(sentence)}")

    sessions.told = say
    # `Correspondence` answers pings in a thread of its own, while this thread trains.
    correspondence = Correspondence(NodeLink(who.address, who.key), who.name, say)
    for answered in serve(correspondence, sessions):
        say(
            f"answered in {answered.seconds:.2f} s "
            f"({answered.bytes_in:,} bytes in, {answered.bytes_out:,} out)"
        )


@client_app.command()
def approve(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a TOML file.")],
    overrides: Overrides = None,
    ledger: Ledger = None,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Take an earlier approval back.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Only list what the recipe asks; approve nothing.")
    ] = False,
) -> None:
    """Tells what a recipe asks of the data's owner, and stores the owner's approval of it."""
    from fedpress.api import approving

    if show:
        found = approving.asked_for(recipe, overrides or ())
    else:
        found = approving.approve(recipe, overrides or (), ledger=ledger, withdraw=withdraw)
    done = "asks for this" if show else "no longer approved" if withdraw else "approved"
    for one in found:
        typer.echo(f"{one.stage} ({one.fingerprint}): {done}")
        # The owner must be able to read what is approved, so the sentences are always printed.
        for sentence in one.words:
            typer.echo(f"  {sentence}")


@client_app.command()
def status(
    policy: Annotated[
        Path | None, typer.Option(help="Policy whose unit and delta are used for epsilon.")
    ] = None,
    ledger: Ledger = None,
    as_json: AsJson = False,
) -> None:
    """Shows requests about the owner's data: asked, answered, refused, and the epsilon spent."""
    import dataclasses
    import json

    from fedpress.network import owner
    from fedpress.network import policy as policies
    from fedpress.network.ledger import OwnerLedger, default_path

    book = OwnerLedger(ledger or default_path())
    # Unit and delta are those of the policy, so that epsilon compares with the policy's limits.
    rows = owner.status(book, policies.read(policy) if policy else policies.Policy())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    for line in owner.table(rows):
        typer.echo(line)
