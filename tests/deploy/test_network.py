"""Deployment over a real SuperLink with TLS and keys: kills change no bits, and what is wrong is told.

`tests/deploy/test_engines_agree.py` compares deployments in which nothing happens.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from socket import create_server

import pytest
import torch
from flwr.app.message import array as flower_array

from fedpress.core.examples import Arrays
from fedpress.errors import NetworkError
from fedpress.network import keys
from fedpress.network.data import ClientData, read_arrays, write_arrays
from fedpress.network.owner import OwnerGate
from fedpress.transport.flower import Address, Incoming, NodeLink, ServerLink, SuperLink
from fedpress.transport.flower import server as flower_server
from fedpress.transport.link import Parcel
from tests.deploy.fleet import (
    CODED,
    NAMES,
    RECIPE,
    SECURE,
    Fake,
    Fleet,
    deployed,
    port,
    processes,
    secrets_of,
    simulated,
)

# Sockets of connections that a killed process broke are closed by the collector, in whichever test comes next.
SOCKETS = "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings(SOCKETS)]
EXAMPLE = 'privacy = { unit = "sample", noise_multiplier = 1.0, delta = 1e-3 }\n'
SHORT = RECIPE.replace("num_rounds = 4", "num_rounds = 1")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three clients, which live as long as this file's tests."""
    torch.set_num_threads(1)
    made = Fleet(tmp_path_factory.mktemp("fleet"), port())
    for name in NAMES:
        made.client(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def link(fleet: Fleet) -> Iterator[ServerLink]:
    """A server in this process, once the server of the first test has ended."""
    with fleet.link() as opened:
        yield opened


def client(fleet: Fleet, name: str):
    """Returns the process of a client."""
    return fleet.commands[NAMES.index(name)]


def same_bits(fleet: Fleet, run, text: str, folder: Path) -> bool:
    """Whether a simulation with the same secrets has the same parameters and bytes each round."""
    records = simulated(text, secrets_of(fleet, run, folder / "simulation"))
    assert len(records) == len(run.records)
    for over_network, in_process in zip(run.records, records, strict=True):
        assert not over_network.refused
        assert torch.equal(over_network.params, in_process.params)
        assert over_network.bytes_up == in_process.bytes_up
        assert over_network.bytes_down == in_process.bytes_down
    return True


def test_a_server_killed_at_any_moment_ends_in_the_same_bits(fleet):
    text = RECIPE + EXAMPLE
    server = fleet.server(text, "run")
    chance = random.Random(0)
    for moment in (r"federate: starting", r"round 2/4"):
        server.wait_for(moment)
        time.sleep(chance.uniform(0, 0.5))
        server.kill()
        # The same command again. The SuperLink of the first one has ended with it.
        server.start()
    assert server.ended() == 0, server.said
    twin = fleet.command(
        "run", str(fleet.folder / "run.toml"), "--out", str(fleet.folder / "twin"), log="twin.log"
    )
    assert twin.ended() == 0, twin.said
    ends = []
    for out in ("run", "twin"):
        place = fleet.folder / out / "stages" / "0-federate"
        result = json.loads((place / "result.json").read_text())["result"]
        ends.append((result["epsilon"], (place / "model.safetensors").read_bytes()))
    assert ends[0] == ends[1]
    # The same processes all the time.
    assert all(client(fleet, name).process.poll() is None for name in NAMES)
    assert not processes(f"{fleet.folder}/run.superlink")


@pytest.mark.parametrize("case", [CODED, SECURE], ids=["coded", "secure"])
def test_a_client_killed_in_round_2_and_started_again_gives_the_same_bits(
    case, fleet, link, tmp_path
):
    run = deployed(RECIPE + case, link, tmp_path / "server")
    rounds = run.rounds()
    next(rounds)
    victim = client(fleet, "c1")

    def kill() -> None:
        victim.kill()
        victim.start()

    killer = threading.Timer(random.Random(0).uniform(0.05, 0.2), kill)
    killer.start()
    list(rounds)
    killer.join()
    assert same_bits(fleet, run, RECIPE + case, tmp_path)


def test_a_superlink_killed_in_a_round_is_started_again(fleet, link, tmp_path):
    run = deployed(RECIPE + CODED, link, tmp_path / "server")
    rounds = run.rounds()
    next(rounds)

    def kill() -> None:
        for number in processes(f"{fleet.folder}/superlink/superlink.secret"):
            os.kill(number, signal.SIGKILL)

    killer = threading.Timer(0.1, kill)
    killer.start()
    list(rounds)
    killer.join()
    assert same_bits(fleet, run, RECIPE + CODED, tmp_path)


def garbage(wire: NodeLink, incoming: Incoming) -> None:
    """Answers with bytes that are no message."""
    asked = incoming.parcel
    wire.reply(incoming, Parcel("answer", asked.request, asked.session, b"\x00\xffgarbage" * 99))


def another_call(wire: NodeLink, incoming: Incoming) -> None:
    """Answers what was not asked."""
    wire.reply(incoming, Parcel("answer", "0" * 16, incoming.parcel.session, incoming.parcel.body))


def too_long(wire: NodeLink, incoming: Incoming) -> None:
    """Announces and sends 20 MB, where the server takes 8."""
    asked = incoming.parcel
    wire.reply(incoming, Parcel("answer", asked.request, asked.session, os.urandom(20 << 20)))


def zeros(wire: NodeLink, incoming: Incoming) -> None:
    """Sends 400 MB of zeros, which are one piece of 5 MB that is named 80 times."""
    asked = incoming.parcel
    wire.reply(incoming, Parcel("answer", asked.request, asked.session, bytes(400 << 20)))


def thick(wire: NodeLink, incoming: Incoming) -> None:
    """Sends 14 MB in two pieces, which are longer than pieces may be."""
    asked = incoming.parcel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 7 << 20)
        wire.reply(incoming, Parcel("answer", asked.request, asked.session, os.urandom(14 << 20)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (garbage, "WireError"),
        (another_call, "it answered another call"),
        (too_long, "bytes that are accepted"),
        (zeros, "bytes that are accepted"),
        (thick, "a piece of more than"),
    ],
    ids=["garbage", "another call", "too long", "zeros", "thick pieces"],
)
def test_a_bad_answer_is_refused_and_the_run_goes_on(
    spoil: Callable[[NodeLink, Incoming], None], said, fleet, link, tmp_path, monkeypatch
):
    monkeypatch.setattr(link, "max_bytes", 8 << 20)
    fake = Fake(fleet, lambda offer: read_arrays(fleet.data("c0")), spoil)
    try:
        run = deployed(SHORT, link, tmp_path, clients=(*NAMES, "fake"))
        (record,) = run.rounds()
    finally:
        fake.close()
    assert list(record.refused) == ["fake"]
    assert said in record.refused["fake"]
    assert [row["client"] for row in record.clients] == list(NAMES)


def test_data_of_another_layout_are_told_on_both_sides(fleet, link, tmp_path):
    write_arrays(tmp_path / "x.npz.safetensors", Arrays(torch.zeros(4, 5), torch.zeros(4).long()))
    wrong = ClientData(tmp_path / "x.npz.safetensors")
    fake = Fake(fleet, wrong.arrays)
    try:
        run = deployed(SHORT, link, tmp_path / "server", clients=(*NAMES, "fake"))
        list(run.rounds())
    finally:
        fake.close()
    assert run.side.population.names == NAMES
    assert any("'fake' does not take part" in one and "shape" in one for one in run.said)


def test_a_policy_refuses_and_the_run_goes_on(fleet, link, tmp_path):
    # By default an owner wants privacy, which this recipe does not promise.
    gate = OwnerGate.open(fleet.data("c0"), policy=None, ledger=tmp_path / "l", certificate=None)
    fake = Fake(fleet, lambda offer: read_arrays(fleet.data("c0")), gate=gate)
    try:
        run = deployed(SHORT, link, tmp_path / "server", clients=(*NAMES, "fake"))
        list(run.rounds())
    finally:
        fake.close()
    assert run.side.population.names == NAMES
    assert any("'fake' does not take part" in one and "privacy" in one for one in run.said)


def test_a_full_disk_of_a_client_is_told_on_both_sides(fleet, link, tmp_path):
    # Long enough for the ledger, and not for the offer with its model.
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    victim = fleet.client("full", data=fleet.data("c0"), limits=full)
    try:
        run = deployed(SHORT, link, tmp_path, clients=(*NAMES, "full"))
        list(run.rounds())
    finally:
        victim.close()
    assert run.side.population.names == NAMES
    assert any("'full' does not take part" in one and "free some space" in one for one in run.said)
    assert "free some space" in victim.said


def test_a_hostile_bundle_is_loaded_by_nobody(fleet, link, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').write('was here')\napp = None\n"
    monkeypatch.setattr(
        flower_server, "BUNDLE", {**flower_server.BUNDLE, "nothing.py": code.encode()}
    )
    # Without the server's secret nobody may submit a run.
    with pytest.raises(NetworkError, match="403"):
        ServerLink(fleet.address, bytes(32), keys={}).open()
    # With it, the run is there, its task is taken, and its messages reach the clients.
    before = {
        name: getattr(flower_server.TaskIdentity, name) for name in ("task_id", "run_id", "node_id")
    }
    hostile = ServerLink(fleet.address, link.secret, keys=link.keys).open()
    try:
        hostile.online()
        sent = {name: Parcel("call", "0" * 16, "0" * 16, b"import nothing") for name in NAMES}
        tickets = hostile.send(sent)
        found: dict[str, object] = {}
        end = time.monotonic() + 60
        while len(found) < len(NAMES) and time.monotonic() < end:
            found |= hostile.poll([one for one in tickets.values() if one not in found])
            time.sleep(0.05)
        assert len(found) == len(NAMES)
    finally:
        hostile.close()
        for name, value in before.items():
            setattr(flower_server.TaskIdentity, name, value)
    run = deployed(SHORT, link, tmp_path / "server")
    list(run.rounds())
    assert not run.records[0].refused
    assert not mark.exists()


def test_an_unlisted_key_is_told_to_its_owner(fleet, link):
    home = fleet.copied("c0", "unlisted")
    keys.write_node_key(home)
    stranger = fleet.client("c0", home=home, log="unlisted.log")
    # It waits: a key that is listed later lets it in.
    stranger.wait_for("does not list the key of this client")
    assert "node.pub" in stranger.said
    stranger.close()


def test_a_client_without_its_key_is_told(fleet):
    home = fleet.copied("c0", "keyless")
    (home / "node.key").unlink()
    stranger = fleet.client("c0", home=home, log="keyless.log")
    assert stranger.ended() == 2
    assert "it lacks node.key" in stranger.said


def test_a_node_without_a_key_is_refused(fleet, link):
    refused = pytest.raises(NetworkError, match="must be registered")
    with closing(NodeLink(fleet.address)) as node, refused:
        node.connect()


def test_a_wrong_authority_is_told(fleet, link, tmp_path):
    keys.Authority.new().write(tmp_path / "ca.key", tmp_path / "ca.crt")
    key = keys.read_node_key(fleet.home("c0") / "node.key")
    address = Address("localhost", fleet.port, tmp_path / "ca.crt")
    refused = pytest.raises(NetworkError, match="is not signed by")
    with closing(NodeLink(address, key)) as node, refused as told:
        node.connect()
    assert told.value.refused


def test_an_expired_certificate_is_told_to_server_and_client(fleet, tmp_path):
    authority = keys.Authority.new()
    authority.write(tmp_path / "ca.key", tmp_path / "ca.crt")
    authority.sign_server("localhost", tmp_path / "key", tmp_path / "crt", days=0)
    time.sleep(1.1)
    address = Address("localhost", port(1), tmp_path / "ca.crt")
    with pytest.raises(NetworkError, match="has expired"):
        SuperLink(
            address,
            tmp_path / "superlink",
            bind="127.0.0.1",
            certificate=tmp_path / "crt",
            key=tmp_path / "key",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")

    def serve() -> None:
        with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True):
            pass

    with create_server(("127.0.0.1", port(2))) as listener:
        server = threading.Thread(target=serve)
        server.start()
        key = keys.read_node_key(fleet.home("c0") / "node.key")
        with pytest.raises(NetworkError, match="fedpress network renew"):
            NodeLink(Address("localhost", port(2), tmp_path / "ca.crt"), key).connect()
        server.join()


def test_a_port_in_use_is_told(fleet, link, tmp_path):
    with pytest.raises(NetworkError, match="end the process that uses the port"):
        SuperLink(fleet.address, tmp_path, bind="127.0.0.1")


def test_a_second_client_with_one_key_is_told_and_the_run_goes_on(fleet, link, tmp_path):
    second = fleet.client("c0", home=fleet.copied("c0", "second"), log="second.log")
    try:
        second.wait_for("a client with this key is connected")
        run = deployed(SHORT, link, tmp_path)
        list(run.rounds())
    finally:
        second.close()
    assert not run.records[0].refused
    assert "fedpress network add" in second.said
