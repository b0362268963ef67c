"""Everything that touches Flower: its SuperLink as a process, and both ends of the wire.

Flower carries bytes here and nothing else. The server starts the SuperLink with its task executor
switched off (`--isolation process`), takes the run's only task itself, and sends messages under its
token; a client speaks the Fleet API from one long-lived process. So no bundle of code is ever
loaded, on any side: neither ServerApp nor ClientApp exist, and a round needs no new process.

Private modules of Flower are used, so the version is pinned exactly; `tests/deploy/test_flower.py`
names whatever has moved in another one.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import NetworkError
from fedpress.transport.link import Lost, Parcel
from fedpress.transport.remote import Presence
from fedpress.wire.message import MAX_BYTES

# Before flwr is imported: it reads them once.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
os.environ.update(QUIET)

FLOWER = "1.42.0"
"""The version of Flower whose private modules are used here."""


def check_installed() -> None:
    """Checks that Flower is installed in the version that this file was written for.

    Raises:
        NetworkError: if it is not, with the command that installs it.
    """
    cure = 'pip install "fedpress[network]"'
    try:
        found = metadata.version("flwr")
    except metadata.PackageNotFoundError as error:
        raise NetworkError("Flower is not installed", place="network", cure=cure) from error
    if found != FLOWER:
        raise NetworkError(f"got Flower {found}, expected {FLOWER}", place="network", cure=cure)


check_installed()

import httpx  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from flwr.app import ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.app.message import remove_content_from_message  # noqa: E402
from flwr.cli.build import build_fab_from_files  # noqa: E402
from flwr.common.constant import (  # noqa: E402
    HEARTBEAT_MIN_INTERVAL,
    HEARTBEAT_PATIENCE,
    SUPERLINK_NODE_ID,
)
from flwr.common.serde import message_to_proto  # noqa: E402
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest  # noqa: E402
from flwr.proto.fab_pb2 import Fab  # noqa: E402
from flwr.proto.fleet_pb2 import (  # noqa: E402
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # noqa: E402
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree  # noqa: E402
from flwr.proto.node_pb2 import Node  # noqa: E402
from flwr.proto.runtime_pb2 import (  # noqa: E402
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType  # noqa: E402
from flwr.supercore.control import ControlHttpClient  # noqa: E402
from flwr.supercore.heartbeat import HeartbeatSender  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (  # noqa: E402
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors import (  # noqa: E402
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import (  # noqa: E402
    generate_key_pairs,
    public_key_to_bytes,
)
from flwr.supercore.runtime import RuntimeHttpClient  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from flwr.supernode.fleet_http_client import FleetHttpClient  # noqa: E402
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # noqa: E402

log = logger(__name__)
T = TypeVar("T")

CHUNK = 4 << 20
"""Bytes of a body that travel as one object; the SuperLink refuses requests of twice as many."""
RETRY = 0.02
"""Seconds between two looks for the names of clients without keys."""
UPLOAD = 150.0
"""Seconds that an announced answer may take to arrive; the SuperLink ends an upload after 180."""
PATIENCE = 300.0
"""Seconds for which a SuperLink that is gone is connected to again."""
BEAT = float(HEARTBEAT_MIN_INTERVAL)
"""Seconds between signs of life. Flower's own is 30 s, and a client that was killed and started
again may not connect before two of them have passed."""
START = 60.0
"""Seconds that a SuperLink may take to start."""
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
SECRET_HEADER = "fedpress-secret"
BUNDLE = {
    # Flower wants a bundle for every run. This one is empty, and nobody loads it.
    "pyproject.toml": b"""[project]
name = "fedpress"
version = "0.0.0"
description = "messages of fedpress; no code"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42.0"]
[tool.flwr.app]
publisher = "fedpress"
fab-format-version = 1
flwr-version-target = "1.42.0"
[tool.flwr.app.components]
serverapp = "nothing:app"
clientapp = "nothing:app"
""",
    "nothing.py": b"app = None\n",
    "LICENSE": b"Apache-2.0\n",
}


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens, and how its certificate is checked.

    Attributes:
        host: name or address.
        port: of the one port that it has.
        ca: certificate of the authority that signed the server's; None without TLS.
    """

    host: str
    port: int
    ca: Path | None = None

    @property
    def text(self) -> str:
        """`host:port`, with brackets around an IPv6 address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address for a browser."""
        return f"{'http' if self.ca is None else 'https'}://{self.text}"

    def client(self, kind: type[T], interceptors: Iterable[Any]) -> T:
        """Returns a client of one of Flower's APIs.

        Raises:
            NetworkError: if the certificate cannot be read.
        """
        try:
            root = None if self.ca is None else self.ca.read_bytes()
            made: T = kind.from_server_address(  # type: ignore[attr-defined]
                self.text, self.ca is None, root, [*interceptors]
            )
        except (OSError, ValueError) as error:
            raise NetworkError(
                f"no certificate can be read ({error})",
                place=str(self.ca),
                cure="copy ca.crt anew from whoever runs the server",
            ) from error
        return made


@contextmanager
def explained(address: Address) -> Iterator[None]:
    """Turns what the network raises into a `NetworkError` that says what to do."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _of_status(error, address) from error
    except (httpx.HTTPError, ObjectPullError, ObjectPushError, OSError) as error:
        raise _of_transport(error, address) from error


def _of_status(error: httpx.HTTPStatusError, address: Address) -> NetworkError:
    status = error.response.status_code
    said = error.response.text[:200]
    # Not `refused`: a SuperLink that was just started learns the keys a moment later, and a key
    # that is listed later lets a waiting client in.
    asked = error.request.url.path
    if status == httpx.codes.PRECONDITION_FAILED and asked.endswith("/activate-node"):
        return NetworkError(
            "the server does not list the key of this client, or a client with it is connected",
            place=address.text,
            cure=(
                "give node.pub to whoever runs the server, who writes it to server.toml and starts "
                f"the server again; a second client needs a key of its own (fedpress network add); "
                f"after a kill this one connects within {HEARTBEAT_PATIENCE * BEAT:.0f} s"
            ),
        )
    if status == httpx.codes.UNAUTHORIZED:
        return NetworkError(
            "the server does not know this key, or this machine's clock is wrong",
            place=address.text,
            cure=(
                "give node.pub to whoever runs the server, who writes it to server.toml, and "
                "compare the clocks (5 minutes apart is too much)"
            ),
            refused=True,
        )
    return NetworkError(
        f"the server answered {status} ({said})", place=address.text, cure="see its superlink.log"
    )


def _of_transport(error: Exception, address: Address) -> NetworkError:
    said = f"{type(error).__name__}: {error}"
    low = said.lower()
    if "certificate has expired" in low:
        return NetworkError(
            "the server's certificate has expired",
            place=address.text,
            cure="whoever runs the server makes a new one with fedpress network renew",
            refused=True,
        )
    if "hostname mismatch" in low or "ip address mismatch" in low:
        return NetworkError(
            "the server's certificate was made for another host",
            place=address.text,
            cure="connect by the name that fedpress network init --host was given",
            refused=True,
        )
    if "certificate" in low or "ssl" in low or "tls" in low:
        return NetworkError(
            f"the server's certificate is not signed by {address.ca} ({said})",
            place=address.text,
            cure="copy ca.crt anew from whoever runs the server",
            refused=True,
        )
    return NetworkError(
        f"the server cannot be reached ({said})",
        place=address.text,
        cure="see whether fedpress server runs there and the port is open",
    )


def _content(parcel: Parcel) -> RecordDict:
    """Writes a parcel as Flower's records; the body apart, so that equal ones travel once."""
    head: dict[str, Any] = {
        "what": parcel.what,
        "request": parcel.request,
        "session": parcel.session,
    }
    records: dict[str, Any] = {"head": ConfigRecord(head)}
    for start in range(0, len(parcel.body), CHUNK):
        chunk = parcel.body[start : start + CHUNK]
        records[f"body{start // CHUNK:06d}"] = ConfigRecord({"bytes": chunk})
    return RecordDict(records)


def _parcel(message: Message) -> Parcel:
    """Reads what `_content` wrote, from anybody.

    Raises:
        ValueError: if it is something else.
    """
    if message.has_error():
        raise ValueError(f"{message.error.reason}")
    records = message.content
    head = records["head"]
    assert isinstance(head, ConfigRecord)
    names = sorted(name for name in records if name.startswith("body"))
    body = b"".join(bytes(records[name]["bytes"]) for name in names)  # type: ignore[arg-type]
    return Parcel(
        str(head["what"]),  # type: ignore[arg-type]
        str(head["request"]),
        str(head["session"]),
        body,
    )


@dataclass(frozen=True, eq=False)
class Incoming:
    """A parcel that has come, and the message that an answer must refer to."""

    parcel: Parcel
    message: Message


class _Arriving:
    """A message whose objects are fetched as they arrive; nobody has checked its size.

    Its sender announces all objects first and sends them then. Nothing here waits for them, because
    others must not wait for a sender that is slow, or that never sends what it has announced.
    """

    def __init__(self, tree: ObjectTree, max_bytes: int) -> None:
        self.root = tree.object_id
        self._names = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
        self._max_bytes = max_bytes
        self._contents: dict[str, bytes] = {}
        self._size = 0
        self._lock = threading.Lock()
        self._since = time.monotonic()

    def read(self, pull: Callable[[str], bytes]) -> Incoming | None:
        """Fetches what has arrived; returns the parcel when it is complete, else None.

        Raises:
            ValueError: if it is too long or no parcel.
            ObjectPullError: if it will not arrive.
        """
        # A body is cut into pieces of CHUNK bytes. Beside them there are four small objects.
        if len(self._names) > self._max_bytes // CHUNK + 8:
            raise ValueError(self._too_long)

        def take(name: str) -> bytes:
            if self._size > self._max_bytes:
                raise ValueError(self._too_long)
            # It is asked for again at the next look.
            with suppress(ObjectUnavailableError):
                content = pull(name)
                # Several threads fetch at the same time.
                with self._lock:
                    self._contents[name] = content
                    self._size += len(content)
            return b""

        pull_objects([name for name in self._names if name not in self._contents], take)
        if len(self._contents) < len(self._names):
            if time.monotonic() - self._since > UPLOAD:
                raise ObjectPullError(self.root, f"it did not arrive within {UPLOAD:.0f} s")
            return None
        if self._size > self._max_bytes + CHUNK:
            raise ValueError(self._too_long)
        try:
            message = inflate_object_from_contents(self.root, self._contents)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = self.root
            return Incoming(_parcel(message), message)
        # Whatever a stranger sends may be wrong in any way.
        except Exception as error:
            raise ValueError(f"not a parcel ({type(error).__name__}: {error})") from error

    @property
    def _too_long(self) -> str:
        return f"more than the {self._max_bytes} bytes that are accepted"


class SuperLink:
    """A SuperLink in a process of its own, which ends with this process.

    Its database lives in memory: nothing of a run is kept there, since checkpoints are the run
    folder's. A SuperLink that was killed is started again by `ServerLink`.
    """

    def __init__(
        self,
        address: Address,
        folder: Path,
        *,
        bind: str | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """Starts it.

        Args:
            address: where this server reaches it; with a `ca` it speaks TLS and asks clients for
                their keys.
            folder: for its log and the secret that this process shares with it.
            bind: the address that it listens on; that of `address` if None.
            certificate: of the server, in PEM.
            key: of the certificate.

        Raises:
            NetworkError: if it does not start, for instance because the port is in use.
        """
        self.address = address
        self.folder = folder
        self._bind = bind or address.host
        self._certificate = certificate
        self._key = key
        folder.mkdir(parents=True, exist_ok=True)
        self.secret_file = folder / "superlink.secret"
        if not self.secret_file.exists():
            self.secret_file.touch(mode=0o600)
            self.secret_file.write_bytes(os.urandom(32))
        self._process = self._start()

    @property
    def secret(self) -> bytes:
        """What shows the SuperLink that a request comes from this server."""
        return self.secret_file.read_bytes()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def restart(self) -> None:
        """Starts it again after its process has died."""
        self.close()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Flower fails late, and in a log, if the port is taken.
        _check_free(self._bind, self.address.port)
        words = [sys.executable, "-m", "fedpress.transport.superlink", str(os.getpid())]
        words += ["--host", self._bind, "--port", str(self.address.port)]
        words += ["--isolation", "process", "--superexec-auth-secret-file", str(self.secret_file)]
        words += ["--disable-runtime-dependency-installation"]
        if self.address.ca is None:
            words += ["--insecure"]
        else:
            words += ["--ssl-ca-certfile", str(self.address.ca)]
            words += ["--ssl-certfile", str(self._certificate), "--ssl-keyfile", str(self._key)]
            words += ["--enable-supernode-auth"]
        home = self.folder / "flower"
        with (self.folder / "superlink.log").open("ab") as out:
            process = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **QUIET, "FLWR_HOME": str(home)},
                # Ctrl-C in the terminal must reach the server alone, which then stops it.
                process_group=0,
            )
        try:
            self._wait_until_up(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + START
        verify: Any = True if self.address.ca is None else _context(self.address.ca)
        with httpx.Client(verify=verify, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < end:
                if process.poll() is not None:
                    break
                try:
                    client.get(f"{self.address.url}/health")
                    return
                except httpx.TransportError as error:
                    if "certificate" in str(error).lower():
                        raise _of_transport(error, self.address) from error
                    time.sleep(0.05)
        raise NetworkError(
            f"the SuperLink did not start ({_last_line(self.folder / 'superlink.log')})",
            place=self.address.text,
            cure=f"see {self.folder / 'superlink.log'}",
        )

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


def _context(ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca.read_text("ascii"))
    return context


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise NetworkError(
                f"the SuperLink cannot listen there ({error.strerror})",
                place=f"{host}:{port}",
                cure="end the process that uses the port, or give another one",
            ) from error


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


@dataclass(eq=False)
class ServerLink:
    """The server's end of the wire; see `fedpress.transport.link.Link`.

    Attributes:
        address: of the SuperLink.
        secret: shared with the SuperLink.
        keys: public key of each client's node, as OpenSSH text, in the order of the clients; None
            without TLS, where clients are known by the names that they give.
        superlink: the process, if this server has started it.
        max_bytes: longest answer that is fetched.
    """

    address: Address
    secret: bytes
    keys: Mapping[ClientId, str] | None = None
    superlink: SuperLink | None = None
    max_bytes: int = MAX_BYTES
    _nodes: dict[ClientId, int] = field(default_factory=dict)
    _names: dict[int, ClientId] = field(default_factory=dict)
    _tickets: set[str] = field(default_factory=set)
    _arriving: dict[str, _Arriving] = field(default_factory=dict)
    _heartbeat: HeartbeatSender | None = None
    _runtime: RuntimeHttpClient | None = None

    def open(self) -> ServerLink:
        """Registers the clients' keys, starts a run and takes its task.

        Raises:
            NetworkError: if the SuperLink cannot be reached, or refuses.
        """
        guard = _Secret(self.secret)
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        control = self.address.client(ControlHttpClient, [version, guard])
        with explained(self.address), closing(control):
            for name, key in (self.keys or {}).items():
                _register(control, name, node_key(key))
            bundle, _ = build_fab_from_files(dict(BUNDLE))
            digest = hashlib.sha256(bundle).hexdigest()
            started = control.StartRun(StartRunRequest(fab=Fab(hash_str=digest, content=bundle)))
            token = self._acquire(started.run_id, guard)
            self._runtime = self.address.client(
                RuntimeHttpClient,
                [
                    RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                    RuntimeTokenHttpInterceptor(token=token),
                    guard,
                ],
            )
            found = self._runtime.PullTaskInput(PullTaskInputRequest())
        self._run = found.run.run_id
        # Flower's Message reads them from there.
        TaskIdentity.task_id = found.task_id
        TaskIdentity.run_id = found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        self._heartbeat = HeartbeatSender(self._beat)
        self._heartbeat.start()
        return self

    def _acquire(self, run: int, guard: _Secret) -> str:
        """Returns the token of the task of `run`."""
        client = self.address.client(
            RuntimeHttpClient,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=self.secret, protected_methods=frozenset({ACQUIRE})
                ),
                guard,
            ],
        )
        end = time.monotonic() + START
        with closing(client):
            # On a SuperLink that others use, tasks of other runs may come first; nobody runs these.
            while time.monotonic() < end:
                found = client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                )
                if found.token and found.task.run_id == run:
                    return str(found.token)
                time.sleep(0.1)
        raise NetworkError(
            "the SuperLink gave its task to another process",
            place=self.address.text,
            cure="start it with --isolation process and the same secret",
        )

    def _healed(self, work: Callable[[], T], nothing: T) -> T:
        """Does `work`; starts the SuperLink again, or connects again, if it is gone.

        Whatever was on its way is lost then: `nothing` is returned, and the transport sends again.
        """
        try:
            return work()
        except NetworkError as problem:
            log.warning("%s", problem)
        wait = 0.5
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if self.superlink is not None and not self.superlink.running:
                    log.warning("the SuperLink has ended, and is started again")
                    self.superlink.restart()
                self._forget()
                self.open()
                return nothing
            except NetworkError:
                if time.monotonic() > end:
                    raise
                time.sleep(wait)
                wait = min(2 * wait, 15.0)

    def _forget(self) -> None:
        """Drops what only the lost SuperLink knew."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
        self._nodes.clear()
        self._names.clear()
        self._tickets.clear()
        self._arriving.clear()

    def _beat(self) -> bool:
        assert self._runtime is not None
        try:
            return bool(self._runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
        except httpx.HTTPError as error:
            log.debug("heartbeat: %s", error)
            return False

    def online(self) -> Mapping[ClientId, bool]:
        """See `Link`; nodes with keys that are not listed are left out."""
        return self._healed(self._look, {})

    def _look(self) -> Mapping[ClientId, bool]:
        assert self._runtime is not None
        with explained(self.address):
            nodes = self._runtime.GetNodes(GetNodesRequest()).nodes
        there = {node.node_id: node.status == "online" for node in nodes}
        if self.keys is None:
            self._name_strangers([node for node, online in there.items() if online])
            return {name: there.get(self._nodes[name], False) for name in sorted(self._nodes)}
        by_key = {node.public_key: node.node_id for node in nodes}
        found = {}
        for name, key in self.keys.items():
            node = by_key.get(node_key(key))
            if node is not None:
                self._nodes[name] = node
            found[name] = node is not None and there[node]
        return found

    def _name_strangers(self, nodes: Collection[int]) -> None:
        """Asks new nodes for the names of their clients; only without TLS, on this machine."""
        new = [node for node in nodes if node not in self._names]
        if not new:
            return
        ping = Parcel("ping", "name", "", b"")
        tickets = self._push(dict.fromkeys(new, ping))
        asked = {ticket: node for node, ticket in tickets.items()}
        end = time.monotonic() + 2.0
        while asked and time.monotonic() < end:
            for ticket, answer in self._fetch(list(asked)).items():
                node = asked.pop(ticket)
                if isinstance(answer, Parcel):
                    name = Presence.from_bytes(answer.body).name
                    self._names[node] = name
                    self._nodes[name] = node
            time.sleep(RETRY)

    def send(self, parcels: Mapping[ClientId, Parcel]) -> dict[ClientId, str]:
        """See `Link`."""
        known = {name: self._nodes[name] for name in parcels if name in self._nodes}
        by_node = {node: parcels[name] for name, node in known.items()}
        nothing: dict[int, str] = {}
        tickets = self._healed(lambda: self._push(by_node), nothing)
        known = {name: node for name, node in known.items() if node in tickets}
        return {name: tickets[node] for name, node in known.items()}

    def _push(self, parcels: Mapping[int, Parcel]) -> dict[int, str]:
        if not parcels:
            return {}
        assert self._runtime is not None
        heads, trees = [], []
        objects: dict[str, Any] = {}
        tickets = {}
        with explained(self.address), no_object_id_recompute():
            for node, parcel in parcels.items():
                message = Message(_content(parcel), dst_node_id=node, message_type="query")
                message.metadata.__dict__["_message_id"] = message.object_id
                tickets[node] = message.object_id
                heads.append(_head(message))
                trees.append(get_object_tree(message))
                objects |= get_all_nested_objects(message)
            answer = self._runtime.PushMessages(
                PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
            )
            push = make_push_object_fn_protobuf(
                self._runtime.PushObject,
                Node(node_id=SUPERLINK_NODE_ID),
                self._run,
                answer.session_id,
            )
            push_objects(objects, push, object_ids_to_push=set(answer.objects_to_push))
        self._tickets.update(tickets.values())
        return tickets

    def poll(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """See `Link`."""
        known = [ticket for ticket in tickets if ticket in self._tickets]
        # Sent through a SuperLink that is gone.
        found: dict[str, Parcel | Lost] = {
            ticket: Lost("the SuperLink was started again")
            for ticket in tickets
            if ticket not in self._tickets
        }
        nothing: dict[str, Parcel | Lost] = {}
        return found | self._healed(lambda: self._fetch(known), nothing) if known else found

    def _fetch(self, tickets: Collection[str]) -> dict[str, Parcel | Lost]:
        """Fetches all answers that are whole; one that is still uploaded stays for the next time.

        So a client on a slow line keeps nobody waiting.
        """
        assert self._runtime is not None
        node = Node(node_id=SUPERLINK_NODE_ID)
        pull = make_pull_object_fn_protobuf(self._runtime.PullObject, node, self._run)
        found: dict[str, Parcel | Lost] = {}
        with explained(self.address):
            new = [ticket for ticket in tickets if ticket not in self._arriving]
            # Without names it would ask for everything that there is.
            pulled = PullAppMessagesRequest(message_ids=new)
            answer = self._runtime.PullMessages(pulled) if new else PullAppMessagesResponse()
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                ticket = head.metadata.reply_to_message_id
                if head.HasField("error"):
                    found[ticket] = Lost(head.error.reason)
                else:
                    self._arriving[ticket] = _Arriving(tree, self.max_bytes)
            # Also those that nobody waits for any more, so that the SuperLink forgets them.
            for ticket, arriving in list(self._arriving.items()):
                fetched = self._fetched(arriving, pull)
                if fetched is None:
                    continue
                del self._arriving[ticket]
                if ticket in tickets:
                    found[ticket] = fetched
                self._runtime.ConfirmMessageReceived(
                    ConfirmMessageReceivedRequest(
                        node=node, run_id=self._run, message_object_id=arriving.root
                    )
                )
        return found

    def _fetched(self, arriving: _Arriving, pull: Callable[[str], bytes]) -> Parcel | Lost | None:
        """Returns an answer that has arrived; None if it has not; `Lost` if its sender erred."""
        try:
            incoming = arriving.read(pull)
        except ObjectPullError as error:
            return Lost(str(error))
        except ValueError as error:
            return Lost(str(error), again=False)
        return None if incoming is None else incoming.parcel

    def close(self) -> None:
        """Ends the run, and the SuperLink if it was started here."""
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._runtime is not None:
            self._runtime.close()
        if self.superlink is not None:
            self.superlink.close()


@dataclass(frozen=True)
class _Secret:
    """Adds to each request what shows that it comes from the server."""

    secret: bytes

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers[SECRET_HEADER] = self.secret.hex()
        return call_next(context)


def _head(message: Message) -> Any:
    """Returns a message without its content, which travels as objects."""
    bare = remove_content_from_message(message) if message.has_content() else message
    return message_to_proto(bare)


def _register(control: ControlHttpClient, name: ClientId, key: bytes) -> None:
    """Tells the SuperLink the key of a client; again after it was started again."""
    with _registered_before():
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


@contextmanager
def _registered_before() -> Iterator[None]:
    """Lets a key pass that the SuperLink knows already."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if "already in use" not in error.response.text:
            raise


def node_key(openssh: str) -> bytes:
    """Returns a public key as Flower names nodes by it.

    Raises:
        NetworkError: if it is no elliptic-curve key in OpenSSH's format.
    """
    try:
        key = serialization.load_ssh_public_key(openssh.encode())
    except (ValueError, TypeError) as error:
        raise NetworkError(
            f"not a public key in OpenSSH's format ({error})",
            place=openssh[:60],
            cure="take the content of node.pub, which fedpress network init wrote",
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise NetworkError(
            "not a key on an elliptic curve", place=openssh[:60], cure="take one of P-384"
        )
    return public_key_to_bytes(key)


class NodeLink:
    """A client's end of the wire: one connection, for one thread.

    It never asks for the bundle of a run, and unpacks nothing but parcels.
    """

    def __init__(
        self,
        address: Address,
        private_key: ec.EllipticCurvePrivateKey | None = None,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Prepares it; `connect` connects.

        Args:
            address: of the SuperLink.
            private_key: of this node; None makes one, for a SuperLink without TLS.
            max_bytes: longest message that is fetched.
        """
        self._given = private_key is not None
        if private_key is None:
            private_key, _ = generate_key_pairs()
        self._key = public_key_to_bytes(private_key.public_key())
        self._address = address
        self._max_bytes = max_bytes
        self._client = address.client(
            FleetHttpClient,
            [
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private_key, private_key.public_key()),
            ],
        )
        self._node = Node()
        self._arriving: list[tuple[int, _Arriving]] = []
        self._beaten = 0.0

    def connect(self) -> None:
        """Connects, or connects again after the SuperLink was started anew.

        Raises:
            NetworkError: if that fails; `refused` says whether trying again makes no sense.
        """
        with explained(self._address):
            # It refuses to activate a node that it takes to be connected.
            if self._is_known():
                self._beaten = time.monotonic()
                return
            if not self._given:
                with _registered_before():
                    self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._key))
            answer = self._client.ActivateNode(
                ActivateNodeRequest(public_key=self._key, heartbeat_interval=BEAT)
            )
        self._node = Node(node_id=answer.node_id)
        # Whatever was on its way through another SuperLink is gone.
        self._arriving.clear()
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """Shows the SuperLink that this client is there, if that is due."""
        if time.monotonic() - self._beaten < BEAT / 3:
            return
        with explained(self._address):
            self._beat()
        self._beaten = time.monotonic()

    def _beat(self) -> bool:
        beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=BEAT)
        return bool(self._client.SendNodeHeartbeat(beat).success)

    def _is_known(self) -> bool:
        """Whether the SuperLink is still the one that this node was connected to."""
        if not self._node.node_id:
            return False
        try:
            return self._beat()
        except httpx.HTTPStatusError:
            return False

    def receive(self) -> Incoming | None:
        """Returns the next parcel for this client; None if there is none now.

        Raises:
            NetworkError: if the server cannot be reached.
        """
        with explained(self._address):
            answer = self._client.PullMessages(PullMessagesRequest(node=self._node))
            for head, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
                run = head.metadata.run_id
                self._arriving.append((run, _Arriving(tree, self._max_bytes)))
            for one in list(self._arriving):
                parcel = self._arrived(*one)
                if parcel is None:
                    continue
                self._arriving.remove(one)
                if isinstance(parcel, Incoming):
                    return parcel
        return None

    def _arrived(self, run: int, arriving: _Arriving) -> Incoming | Lost | None:
        """Returns a message that is complete; None if it is not; `Lost` if it never will be."""
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run)
        found: Incoming | Lost | None
        try:
            found = arriving.read(pull)
        except (ObjectPullError, ValueError) as error:
            log.warning("a message was dropped (%s)", error)
            found = Lost(str(error))
        if found is None:
            return None
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=run, message_object_id=arriving.root
            )
        )
        return found

    def reply(self, incoming: Incoming, parcel: Parcel, seconds: float = 0.0) -> bool:
        """Sends an answer; returns False if nobody waits for it any more.

        Raises:
            NetworkError: if the server cannot be reached.
        """
        with no_object_id_recompute():
            message = Message(_content(parcel), reply_to=incoming.message)
            message.metadata.__dict__["_message_id"] = message.object_id
            try:
                with explained(self._address):
                    answer = self._client.PushMessages(
                        PushMessagesRequest(
                            node=self._node,
                            messages_list=[_head(message)],
                            message_object_trees=[get_object_tree(message)],
                            clientapp_runtime_list=[seconds],
                        )
                    )
                    push = make_push_object_fn_protobuf(
                        self._client.PushObject,
                        self._node,
                        incoming.message.metadata.run_id,
                        answer.session_id,
                    )
                    wanted = set(answer.objects_to_push)
                    push_objects(get_all_nested_objects(message), push, object_ids_to_push=wanted)
            except NetworkError as error:
                cause = error.__cause__
                gone = (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)
                # The run is over, or was started again: its server does not wait for this.
                if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code in gone:
                    log.info("an answer was dropped: its run is over")
                    return False
                if isinstance(cause, ObjectPushError):
                    log.info("an answer was dropped: %s", cause)
                    return False
                raise
        return True

    def close(self) -> None:
        """Says goodbye, if the server is there."""
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, RuntimeError) as error:
            log.debug("goodbye failed: %s", error)
        self._client.close()
