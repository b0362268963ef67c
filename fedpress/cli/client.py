"""The commands of a data owner: `fedpress client`, `client approve` and `client status`."""

from __future__ import annotations

from dataclasses import dataclass
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
    exit_stack,
    in_one_line,
    quit_on_term,
    stopping,
    warn,
)

# Only for type checkers: `--help` must not wait for torch and Flower.
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedpress.network.data import ClientData
    from fedpress.network.gate import Gate
    from fedpress.transport.flower import Address


client_app = typer.Typer(
    invoke_without_command=True, help="Take part with the data of this machine, until stopped."
)
Ledger = Annotated[
    Path | None, typer.Option(help="The owner's ledger; by default one for this user.")
]


@client_app.callback()
def client(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="This client's examples: .safetensors or .npz with x and y, .csv, .parquet, .txt, or "
            "a folder label/image.png.",
        ),
    ] = None,
    network: NetworkFolder = None,
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
    from fedpress.network.data import ClientData

    with stopping("stopped; state and ledger are kept, the same command goes on"), quit_on_term():
        who = _who(network, to, name)
        _take_part(who, ClientData(data, who.table), policy, ledger, program, device)


@dataclass(frozen=True)
class _Who:
    """Identity of this client, and address of its server.

    Attributes:
        name: name of the client.
        place: the client's folder, for its state.
        address: address and certificate of the server.
        key: private key by which the server recognises this client; None with --insecure.
        threads: number of threads that torch uses.
        table: how this client's table is written, where it differs from the server's.
    """

    name: str
    place: Path
    address: Address
    key: ec.EllipticCurvePrivateKey | None
    threads: int
    table: dict[str, str]


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
        config = found.config
        table = config.data.model_dump(exclude_none=True)
        return _Who(config.name, place, address, key, config.threads, table)
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
    return _Who(name, place, address, None, 1, {})


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
    own: ClientData,
    policy: Path | None,
    ledger: Path | None,
    program: Path | None,
    device: str | None,
) -> None:
    """Connects to the server, and answers its calls until the process is stopped.

    Args:
        who: the client and its server.
        own: the client's data.
        policy: file with the owner's policy; None: see `_gate`.
        ledger: file of the owner's ledger; None: the ledger of this user.
        program: an exported training program that replaces torch; None: torch trains.
        device: where to train; None: on the CPU.
    """
    import torch

    from fedpress.network import keys
    from fedpress.network.client import serve
    from fedpress.network.identities import FILE, KnownIdentities
    from fedpress.network.node import Correspondence
    from fedpress.network.sessions import Sessions
    from fedpress.training.device import find
    from fedpress.transport.flower import NodeLink
    from fedpress.workspace import lock

    if program is not None:
        from fedpress.deploy.device_model import DeviceModel

        # A missing file or runtime is told now, and not only when the server offers a run.
        DeviceModel(program)
    # Two processes with one folder would answer the same calls, and disturb each other's state.
    exit_stack.enter_context(lock.locked(who.place))
    # The number of threads is fixed, because it decides in which order floats are added up, and so
    # how they are rounded. A client that is started again must compute the same bits.
    torch.set_num_threads(who.threads)
    sessions = Sessions(
        who.name,
        who.place / "sessions",
        own.arrays,
        _gate(who, own.path, policy, ledger),
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

    from fedpress.network import policy as policies
    from fedpress.network import status as statuses
    from fedpress.network.ledger import OwnerLedger, default_path

    book = OwnerLedger(ledger or default_path())
    # Unit and delta are those of the policy, so that epsilon compares with the policy's limits.
    rows = statuses.status(book, policies.read(policy) if policy else policies.Policy())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    for line in statuses.table(rows):
        typer.echo(line)
