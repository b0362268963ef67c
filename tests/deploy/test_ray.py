"""Clients in actors on two Ray nodes of one machine give the bits of the local engine, also when one is lost.

`tests/deploy/test_engines_agree.py` compares all kinds of stages on one node.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedpress.core import parameters
from fedpress.errors import NetworkError
from fedpress.federation import InMemoryState, Start
from fedpress.federation.client_state import load_json, save_json
from fedpress.federation.exchange import exchange
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.transport.engine import engine_settings, open_engine
from fedpress.transport.ray.transport import LOST
from fedpress.wire import Message, pack, unpack

if find_spec("ray") is None:  # not imported here: it reads the token then
    pytest.skip("could not import 'ray'", allow_module_level=True)
pytestmark = pytest.mark.deploy

PORT = 23000
"""First of the ports of the cluster."""
HOSTS = ("127.0.0.2", "127.0.0.3")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
"""Of the cluster; whoever has it may run code there."""
RECIPE = """
[data]
source = "digits"
num_clients = 4
examples_per_client = 20
validation = 20
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 10
trainable = ["head.*"]
"""
CODED = """
downlink = [{ kind = "quantize", bits = 8 }]
uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]
error_feedback = true
"""


def started(host: str, *words: str) -> subprocess.Popen:
    """Starts a Ray node that ends its processes when it is terminated."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    more = [f"--node-ip-address={host}", "--object-store-memory=100000000"]
    return subprocess.Popen(
        [*command, *more, "--include-log-monitor=0", *words],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def ports(first: int) -> list[str]:
    """Returns options that give a node its own ports."""
    names = ["node-manager-port", "object-manager-port", "metrics-export-port"]
    names += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"]
    options = [f"--{name}={first + at}" for at, name in enumerate(names, 1)]
    return [*options, f"--min-worker-port={first + 10}", f"--max-worker-port={first + 40}"]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with one CPU each, which have addresses of their own."""
    address = f"{HOSTS[0]}:{PORT}"
    os.environ.update(TOKEN)
    head = ["--head", f"--port={PORT}", "--include-dashboard=false", "--disable-usage-stats"]
    nodes = [started(HOSTS[0], *head, f"--ray-client-server-port={PORT + 90}", *ports(PORT + 100))]
    try:
        wait_for_port(HOSTS[0], PORT)
        nodes.append(started(HOSTS[1], f"--address={address}", *ports(PORT + 200)))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)
    left = subprocess.run(["pgrep", "-f", address], capture_output=True, text=True).stdout
    assert left.split() == []


def wait_for_port(host: str, port: int) -> None:
    for _ in range(600):
        with socket.socket() as line:
            if not line.connect_ex((host, port)):
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.fixture(scope="module")
def opened(cluster):
    """The engine with two actors, one on each node; torch has one thread here, as they have."""
    import ray

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with open_engine(engine_settings({"kind": "ray", "address": cluster})) as engine:
        for _ in range(600):
            if sum(node["Alive"] for node in ray.nodes()) == 2:
                break
            time.sleep(0.1)
        engine.settings = engine.settings.model_copy(update={"actors": 2})
        yield engine
    torch.set_num_threads(threads)


@pytest.fixture
def engine(opened):
    yield opened
    opened.end_stage()


def of(more: str):
    loaded = recipes.load(RECIPE + more)
    return loaded.stage[0], first_state(loaded, load_data(loaded))


def all_rounds(server):
    return list(server.rounds(Start(parameters.flatten(server.model))))


def test_actors_on_two_nodes_give_the_bits_and_bytes_of_the_local_engine(engine):
    stage, state = of(CODED)
    here, there = bind(stage, state).server, bind(stage, replace(state, engine=engine)).server
    expected, found = all_rounds(here), all_rounds(there)
    assert not torch.equal(expected[0].params, expected[-1].params)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.params, other.params)
        assert one.refused == other.refused == {}
    assert there.transport.traffic == here.transport.traffic
    assert there.client_scores(found[-1].params) == here.client_scores(expected[-1].params)


def test_a_lost_actor_is_a_lost_client_of_that_round(engine):
    stage, state = of(CODED)
    local, there = bind(stage, state), bind(stage, replace(state, engine=engine)).server
    running = there.rounds(Start(parameters.flatten(there.model)))
    found = [next(running)]
    home = engine.latest.homes[0]
    assert home.clients == (there.population.names[0], there.population.names[2])
    engine.ray.kill(home.actor)
    found += list(running)
    # The same with the local engine: the first of the actor's clients fails in the second round.
    handlers = local.server.transport.handlers
    name = home.clients[0]
    handle, asked = handlers[name], []

    def failing(request):
        asked.append(request)
        if len(asked) == 2:
            raise RuntimeError(LOST)
        return handle(request)

    handlers[name] = failing
    expected = all_rounds(local.server)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.params, other.params)
    assert [list(one.refused) for one in found] == [[], [name], []]
    assert LOST in found[1].refused[name]


def test_a_process_that_is_killed_at_work_costs_one_answer(engine):
    pickle_here(engine)
    transport = engine.connect({name: Killed(name) for name in "abcd"}, shared)
    requests = {name: Message("die" if name == "a" else "m") for name in "abcd"}
    replies = dict(exchange(transport, requests))
    assert {name: reply.kind for name, reply in replies.items()} == {
        "a": "error",
        "b": "m",
        "c": "m",
        "d": "m",
    }
    assert dict(exchange(transport, {"a": Message("m")}))["a"].kind == "m"


def test_a_cancelled_request_leaves_no_trace(engine):
    pickle_here(engine)
    transport = engine.connect({name: Killed(name) for name in "ab"}, shared)
    first, second = transport.send("a", Message("m")), transport.send("b", Message("m"))
    transport.cancel([first])
    assert transport.receive([first]) is None
    assert transport.receive([second], timeout=60)[0] == "b"
    assert dict(exchange(transport, {"a": Message("m")}))["a"].header == {"asked": 1}
    assert dict(exchange(transport, {"a": Message("m")}))["a"].header == {"asked": 2}


def test_a_cluster_without_room_is_told_before_the_run(engine):
    small = replace(engine, settings=engine.settings.model_copy(update={"actors": 3}))
    with pytest.raises(NetworkError, match=r"engine.actors: .* room for 2 actors"):
        small.connect({name: Killed(name) for name in "abcd"}, shared)


def test_a_killed_run_goes_on_with_another_engine(cluster, opened, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("num_rounds = 3", "num_rounds = 12") + CODED)
    command = [str(Path(sys.executable).with_name("fedpress")), "run"]
    if not Path(command[0]).exists():
        command = [sys.executable, "-m", "fedpress", "run"]
    cluster_words = ["--engine", "ray", "--ray-address", cluster, "--actors", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(*words, **more):
        line = [*command, *map(str, words)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, **more)

    assert call(recipe, "--out", tmp_path / "local").wait(timeout=120) == 0
    going = call(recipe, "--out", tmp_path / "run", *cluster_words)
    records = tmp_path / "run" / "records.jsonl"
    for _ in range(1200):
        if records.exists() and records.read_text().count("\n") >= 2:
            break
        assert going.poll() is None
        time.sleep(0.05)
    going.send_signal(signal.SIGKILL)
    going.wait()
    assert records.read_text().count("\n") < 12
    assert call("--resume", tmp_path / "run").wait(timeout=120) == 0
    models = [next((tmp_path / name).rglob("model.safetensors")) for name in ("local", "run")]
    assert models[0].read_bytes() == models[1].read_bytes()


@dataclass
class Killed:
    """A client that kills its process when it is told to, and counts its other requests."""

    name: str
    common: object = None
    memory: object = field(default_factory=InMemoryState)

    def handle(self, request):
        message = unpack(request)
        if message.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        asked = 1 + load_json(self.memory, "asked").get("count", 0)
        save_json(self.memory, "asked", {"count": asked})
        return pack(Message(message.kind, {"asked": asked}))


def shared(device):
    """Makes what the clients share: nothing."""


def pickle_here(engine):
    """Sends classes of this file by value: a worker cannot import it."""
    engine.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
