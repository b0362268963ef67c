"""The folders of a network: one for the server and one for each client, with keys and settings.

`fedpress network init` creates them; each is then copied to its machine. The folder `authority`
contains the key that signs the server's certificates, and stays with whoever set the network up.
"""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from fedpress.core.names import ClientId
from fedpress.core.settings import SETTINGS
from fedpress.errors import NetworkError
from fedpress.network import keys
from fedpress.network.units import client_dockerfile, client_unit, server_dockerfile, server_unit

PORT = 9443
"""Port on which the server listens if none is given."""
# A new client begins with rules for privacy: an owner who wants none must say so.
POLICY = """\
# What this client's owner allows; a key that is not set has its default. All keys: docs/deploy.md.
# families = ["cnn", "mlp"]
# min_cohort = 2
# require_approval = true
# rounds_per_day = 100

# Every run must promise at least this. Replace the section by  privacy = "none"  to allow any run.
[privacy]
unit = "sample"
max_epsilon = 8.0
total_epsilon = 8.0
delta = 1e-5
"""
ALL = "0.0.0.0"
"""Address to listen on that stands for all addresses of the machine."""
# Type of a settings class, see `_config`.
T = TypeVar("T", bound=BaseModel)


class ServerConfig(BaseModel):
    """The file `server.toml`: where the server listens, and which clients' keys it accepts."""

    model_config = SETTINGS

    host: str = Field(description="the name or address by which clients reach the server")
    port: int = Field(PORT, ge=1, le=65535, description="the one port that must be open")
    bind: str = Field(ALL, description="the address to listen on; 0.0.0.0: all of them")
    clients: dict[ClientId, str] = Field(description="the public key (node.pub) of each client")


class OwnTable(BaseModel):
    """`[data]` of `client.toml`: how this client's table is written, where it differs."""

    model_config = SETTINGS

    delimiter: str | None = Field(
        default=None, min_length=1, max_length=1, description="the character between the columns"
    )
    decimal: Literal[".", ","] | None = Field(
        default=None, description="decimal separator of numbers"
    )
    encoding: str | None = Field(
        default=None, description="encoding of a CSV file, such as latin-1"
    )


class ClientConfig(BaseModel):
    """The file `client.toml`: name of the client, and address of its server."""

    model_config = SETTINGS

    name: ClientId = Field(description="name of this client in server.toml")
    server: str = Field(description="host:port of the server")
    threads: int = Field(1, ge=1, description="threads that train; their number affects rounding")
    data: OwnTable = Field(
        default=OwnTable(),
        description="how this client's CSV file is written, unless as the server's",
    )


@dataclass(frozen=True)
class ServerFolder:
    """The server's folder, read and checked.

    Attributes:
        path: the folder, with `server.toml`, `ca.crt`, `server.crt` and `server.key`.
        config: content of `server.toml`.
    """

    path: Path
    config: ServerConfig

    @classmethod
    def read(cls, path: Path) -> ServerFolder:
        """Reads the folder, and checks its keys and certificates.

        Raises:
            NetworkError: if a file is missing or wrong, or the certificate has expired.
        """
        config = _config(path / "server.toml", ServerConfig)
        _check_files(path, ("ca.crt", "server.crt", "server.key"))
        _check_clients(path / "server.toml", config.clients)
        keys.check_server(path / "ca.crt", path / "server.crt", path / "server.key")
        # Checked here, since each client would only report that TLS failed.
        if keys.days_left(path / "server.crt") < 0:
            raise NetworkError(
                "the server's certificate has expired",
                place=str(path / "server.crt"),
                cure="make a new one with fedpress network renew, and copy it here",
            )
        return cls(path, config)


@dataclass(frozen=True)
class ClientFolder:
    """The folder of one client, read and checked.

    The client also stores the state of its runs in this folder.

    Attributes:
        path: the folder, with `client.toml`, `ca.crt`, `node.key` and usually `policy.toml`.
        config: content of `client.toml`.
    """

    path: Path
    config: ClientConfig

    @classmethod
    def read(cls, path: Path) -> ClientFolder:
        """Reads the folder.

        Raises:
            NetworkError: if `client.toml`, `ca.crt` or `node.key` is missing, or `client.toml` is
                wrong. The content of the other files is not checked here.
        """
        config = _config(path / "client.toml", ClientConfig)
        _check_files(path, ("ca.crt", "node.key"))
        try:
            host_and_port(config.server)
        except NetworkError as error:
            error.place = f"{path / 'client.toml'}: server"
            raise
        return cls(path, config)

    @property
    def sessions(self) -> Path:
        """Folder in which the client stores its sessions. A session is one stage of one run."""
        return self.path / "sessions"


def host_and_port(text: str) -> tuple[str, int]:
    """Splits `host:port` or `[address]:port` into host and port.

    Raises:
        NetworkError: if the text has another form, or the port is not from 1 to 65535.

    >>> host_and_port("server.example:9443"), host_and_port("[::1]:9443")
    (('server.example', 9443), ('::1', 9443))
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise NetworkError(
            f"got '{text}'", place="server", cure="write host:port, such as server.example:9443"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def init(out: Path, clients: Sequence[ClientId], host: str, port: int) -> None:
    """Creates the folder of a new network: `authority`, `server` and `clients/NAME`.

    Args:
        out: path of the new folder; it must not exist.
        clients: names of the clients.
        host: name or address by which the clients reach the server.
        port: port on which the server listens.

    Raises:
        NetworkError: if the folder exists, or a name, the host or the port is not valid.
    """
    if out.exists():
        raise NetworkError(
            "the folder exists already, and a new network would replace its keys",
            place=str(out),
            cure="give another folder with --out, or a further client with fedpress network add",
        )
    # All arguments are checked before the first file is written: half a network cannot be used,
    # and the folder would then be in the way of the next attempt.
    _check_names(clients)
    _check_host(host)
    if not 0 < port < 65536:
        raise NetworkError(f"got {port}", place="port", cure="give one from 1 to 65535")
    authority = keys.Authority.new()
    home = out / "authority"
    home.mkdir(parents=True)
    authority.write(home / "ca.key", home / "ca.crt")
    server = out / "server"
    server.mkdir()
    (server / "ca.crt").write_bytes((home / "ca.crt").read_bytes())
    authority.sign_server(host, server / "server.key", server / "server.crt")
    public = {name: _make_client(out, name, host, port) for name in clients}
    _write_server(server, ServerConfig(host=host, port=port, bind=ALL, clients=public))
    (server / "fedpress-server.service").write_text(server_unit())
    (server / "Dockerfile").write_text(server_dockerfile(port))


def add(out: Path, name: ClientId) -> None:
    """Creates the folder of a further client, and adds its public key to `server.toml`.

    Args:
        out: folder of the network.
        name: name of the new client.

    Raises:
        NetworkError: if there is a client of this name, the name is not valid, or
            `ServerFolder.read` refuses the server's folder.
    """
    folder = ServerFolder.read(out / "server")
    config = folder.config
    if name in config.clients:
        raise NetworkError(
            f"there is a client '{name}'", place="clients", cure="choose another name"
        )
    _check_names([name])
    if (out / "clients" / name).exists():
        raise NetworkError(
            "it exists, but its key is not in server.toml",
            place=str(out / "clients" / name),
            cure=f"remove the folder, or write its node.pub to server.toml as '{name}'",
        )
    # The client's folder is made first. If this fails, `server.toml` does not yet list a key that
    # no client has.
    public = _make_client(out, name, config.host, config.port)
    clients = {**config.clients, name: public}
    _write_server(folder.path, config.model_copy(update={"clients": clients}))


def renew(out: Path) -> None:
    """Creates a new key and certificate for the server, signed by the network's authority.

    Args:
        out: folder of the network.

    Raises:
        NetworkError: if `server.toml`, or the key or certificate of the authority, is missing or
            wrong.
    """
    config = _config(out / "server" / "server.toml", ServerConfig)
    authority = keys.Authority.read(out / "authority" / "ca.key", out / "authority" / "ca.crt")
    server = out / "server"
    authority.sign_server(config.host, server / "server.key", server / "server.crt")


def _make_client(out: Path, name: ClientId, host: str, port: int) -> str:
    """Creates the folder of a client, and returns its public key."""
    folder = out / "clients" / name
    folder.mkdir(parents=True)
    (folder / "ca.crt").write_bytes((out / "authority" / "ca.crt").read_bytes())
    public = keys.write_node_key(folder)
    # An IPv6 address contains colons, so it needs brackets before its port.
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    config = ClientConfig(name=name, server=address, threads=1)
    (folder / "policy.toml").write_text(POLICY)
    # How its table is written is for its owner to say.
    (folder / "client.toml").write_text(tomli_w.dumps(config.model_dump(exclude={"data"})))
    (folder / "fedpress-client.service").write_text(client_unit(name))
    (folder / "Dockerfile").write_text(client_dockerfile())
    return public


def _write_server(folder: Path, config: ServerConfig) -> None:
    (folder / "server.toml").write_text(tomli_w.dumps(config.model_dump()))


def _check_clients(path: Path, clients: Mapping[ClientId, str]) -> None:
    """Checks that the public keys in `server.toml` are valid, and that no two are equal.

    `path` is the file, for errors.
    """
    seen: dict[str, ClientId] = {}
    for name, text in clients.items():
        place = f"{path}: clients.{name}"
        key = keys.check_public(text, place)
        if key in seen:
            raise NetworkError(
                f"it has the key of '{seen[key]}'",
                place=place,
                cure="give each client its own key: fedpress network add makes one",
            )
        seen[key] = name


def _check_host(host: str) -> None:
    """Checks that `host` is an IP address or a host name, without port or scheme."""
    plain = host.replace("-", "").replace(".", "").replace("_", "")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not (plain.isascii() and plain.isalnum()):
            raise NetworkError(
                f"got '{host}'",
                place="host",
                cure="give a name or an address alone, such as server.example or 192.0.2.1",
            ) from None


def _check_names(names: Sequence[ClientId]) -> None:
    """Checks that the names are different, and that folders can be named by them."""
    if not names:
        raise NetworkError("got none", place="clients", cure="give a number or names: --clients 3")
    for name in names:
        plain = name.replace("-", "").replace("_", "").replace(".", "")
        # A folder named "." or ".." exists already; "-name" would look like an option of a command.
        if not plain.isalnum() or name.startswith((".", "-")) or len(name) > 60:
            raise NetworkError(
                f"got '{name}'",
                place="clients",
                cure="use letters, digits, '-', '_' and '.', since folders are named by it",
            )
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise NetworkError(f"'{twice[0]}' comes twice", place="clients", cure="name each once")


def _config(path: Path, kind: type[T]) -> T:
    """Reads a TOML file as an object of the settings class `kind`."""
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise NetworkError(
            f"it cannot be read ({error.strerror})",
            place=str(path),
            cure="give the folder that fedpress network init wrote, with --network",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NetworkError(f"not TOML ({error})", place=str(path), cure="mend that line") from error
    except ValidationError as error:
        # One mistake at a time: the others often follow from the first.
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.model_fields)
        raise NetworkError(
            f"{where}: {first['msg']}", place=str(path), cure=f"its keys are {known}"
        ) from error


def _check_files(folder: Path, names: Sequence[str]) -> None:
    missing: list[Any] = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise NetworkError(
            f"it lacks {', '.join(missing)}",
            place=str(folder),
            cure="copy the folder anew from whoever set the network up",
        )
