"""Clients in worker processes: the same answers in the same order, and what happens when a worker dies."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedpress.errors import RecipeError, RunError
from fedpress.federation import DiskState, InMemoryState
from fedpress.federation.client_state import load_json, save_json
from fedpress.federation.exchange import exchange
from fedpress.transport.engine import AutoEngine, engine_settings, open_engine
from fedpress.transport.local import LocalTransport
from fedpress.transport.processes import pool as pool_module
from fedpress.transport.processes import settings as settings_module
from fedpress.transport.processes.engine import ProcessEngine
from fedpress.transport.processes.transport import ProcessTransport
from fedpress.transport.stacked import StackedTransport
from fedpress.wire import Message


@dataclass
class Side:
    """A client that counts its requests, does what the request says, and tells its process."""

    name: str
    num_examples: int = 1
    common: object = field(default_factory=lambda: SimpleNamespace(model=nn.Linear(1, 1)))
    memory: object = field(default_factory=InMemoryState)
    recalled: int = 0

    def recall(self):
        self.recalled += 1

    def answer(self, message):
        if "begun" in message.header:
            with open(message.header["begun"], "a") as file:
                file.write(self.name)
        what = message.header.get("do", {}).get(self.name, "")
        if what == "die" or (what == "die once" and not os.path.exists(message.header["mark"])):
            if what == "die once":
                open(message.header["mark"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise ValueError("no")
        if what == "print":
            print("printed by", self.name)
        if what == "optimizer":
            torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        if what == "log":
            logging.getLogger("fedpress.there").warning("from %s", self.name)
        time.sleep(message.header.get("seconds", {}).get(self.name, 0))
        asked = 1 + load_json(self.memory, "asked").get("count", 0)
        save_json(self.memory, "asked", {"count": asked})
        header = {
            "name": self.name,
            "asked": asked,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "compiler": "torch._dynamo" in sys.modules,
        }
        return Message("update", header, {k: t + asked for k, t in message.tensors.items()})


def sides(names="abcdefgh", **more):
    return {name: Side(name, **more) for name in names}


@pytest.fixture
def connect():
    made = []

    def connected(clients, workers=2, **more):
        made.append(ProcessTransport(clients, workers, **more))
        return made[-1]

    yield connected
    for transport in made:
        transport.close()


def fit(**header):
    return Message("fit", header, {"x": torch.arange(1000.0)})


def of_sides(clients):
    return LocalTransport.of_messages({name: side.answer for name, side in clients.items()})


def ask(transport, message, names=None):
    return list(exchange(transport, dict.fromkeys(names or transport.clients(), message)))


def test_answers_come_in_the_order_of_the_requests_from_several_processes(connect):
    transport = connect(sides())
    slow = fit(seconds={"a": 0.2, "e": 0.1})
    for round in (1, 2, 3):
        answers = ask(transport, slow)
        assert [name for name, _ in answers] == list("abcdefgh")
        for name, reply in answers:
            assert reply.header["name"] == name
            assert reply.header["asked"] == round
            assert reply.header["threads"] == 1
            assert torch.equal(reply.tensors["x"], torch.arange(1000.0) + round)
    pids = {reply.header["pid"] for _, reply in answers}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_bytes_are_counted_as_by_the_local_transport(connect):
    there, here = connect(sides()), of_sides(sides())
    for message in (fit(), fit(do={"b": "raise"}), Message("hello")):
        ask(there, message)
        ask(here, message)
    # The numbers of the processes have as many digits, or nearly.
    assert there.traffic.down == here.traffic.down
    assert abs(there.traffic.up - here.traffic.up) <= 2 * 24


def test_only_training_and_evaluation_go_to_workers(connect):
    transport = connect(sides())
    assert {reply.header["pid"] for _, reply in ask(transport, Message("hello"))} == {os.getpid()}
    assert transport.num_workers == 0
    ask(transport, fit())
    assert transport.num_workers == 2
    assert {reply.header["pid"] for _, reply in ask(transport, Message("unmask"))} == {os.getpid()}


def test_workers_are_made_anew_after_a_new_agreement(connect):
    clients = sides("ab")
    transport = connect(clients)
    first = {reply.header["pid"] for _, reply in ask(transport, fit())}
    ask(transport, Message("agree"))
    assert transport.num_workers == 0
    again = ask(transport, fit())
    assert not first & {reply.header["pid"] for _, reply in again}
    assert [reply.header["asked"] for _, reply in again] == [3, 3]


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_a_client_stores_is_there_in_every_process(on_disk, connect, tmp_path):
    clients = sides()
    if on_disk:
        for name, side in clients.items():
            side.memory = DiskState(tmp_path / name)
    transport = connect(clients)
    for _ in range(5):
        ask(transport, fit())
    assert {load_json(side.memory, "asked")["count"] for side in clients.values()} == {5}


def test_a_cancelled_request_leaves_no_trace(connect):
    clients = sides("abcd")
    transport = connect(clients)
    message = fit(seconds=dict.fromkeys("abcd", 0.05))
    ask(transport, message)
    numbers = [transport.send(name, message) for name in "abcd"]
    assert transport.receive(numbers[:1])[0] == "a"
    transport.cancel(numbers[1:])
    assert transport.receive(numbers[1:]) is None
    time.sleep(0.2)
    assert [reply.header["asked"] for _, reply in ask(transport, message)] == [3, 2, 2, 2]
    assert ask(transport, Message("hello"))[1][1].header["asked"] == 3


def test_a_client_that_fails_sends_an_error(connect):
    replies = dict(ask(connect(sides()), fit(do={"c": "raise"})))
    assert replies["c"].kind == "error"
    assert replies["c"].header["reason"] == "ValueError: no"
    assert {reply.kind for name, reply in replies.items() if name != "c"} == {"update"}


def test_the_clients_of_a_dead_worker_are_asked_again_and_it_is_told(connect, tmp_path, caplog):
    transport = connect(sides())
    message = fit(do={"c": "die once"}, mark=str(tmp_path / "mark"))
    for round in (1, 2):
        answers = ask(transport, message)
        assert [name for name, _ in answers] == list("abcdefgh")
        assert {reply.header["asked"] for _, reply in answers} == {round}
    assert caplog.text.count("a worker process has ended (exit code -9)") == 1
    assert transport.num_workers == 2


def test_a_request_that_kills_every_worker_is_refused_and_the_rest_goes_on(connect):
    transport = connect(sides())
    for _ in range(3):
        replies = dict(ask(transport, fit(do={"a": "die", "h": "die"})))
        assert replies["a"].kind == replies["h"].kind == "error"
        assert "2 worker processes have ended" in replies["a"].header["reason"]
        assert {replies[name].kind for name in "bcdefg"} == {"update"}
    assert {reply.kind for _, reply in ask(transport, fit())} == {"update"}


def test_messages_that_fit_into_no_slot_go_through_the_pipe(connect):
    transport = connect(sides())
    ask(transport, fit())
    large = Message("fit", {}, {"x": torch.arange(3_000_000.0)})
    kept = [reply.tensors["x"] for _, reply in ask(transport, large)]
    # Kept over further rounds: more answers than there are slots.
    for _ in range(3):
        kept += [reply.tensors["x"] for _, reply in ask(transport, fit())]
    assert [int(x[0]) for x in kept] == [2] * 8 + [3] * 8 + [4] * 8 + [5] * 8
    assert all(int(x[-1]) == len(x) - 1 + int(x[0]) for x in kept)


def test_what_a_client_logs_is_logged_here(connect, caplog):
    with caplog.at_level(logging.INFO, "fedpress"):
        ask(connect(sides()), fit(do={"b": "log"}))
    assert [r.getMessage() for r in caplog.records if r.name == "fedpress.there"] == ["from b"]


def test_what_a_client_prints_is_written_though_workers_are_killed(connect, tmp_path, monkeypatch):
    # A file, and no terminal: Python would keep the lines until the process ends by itself.
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        transport = connect(sides())
        ask(transport, fit(do={"b": "print", "h": "print"}))
        transport.close()
        printed = (tmp_path / "out").read_text().splitlines()
    assert sorted(printed) == ["printed by b", "printed by h"]


OPTIMIZER = """
import sys
sys.path.insert(0, {folder!r})
from test_transport import ProcessTransport, ask, fit, sides
transport = ProcessTransport(sides("ab"), 2)
for _, reply in ask(transport, fit(do=dict.fromkeys("ab", "optimizer"))):
    print(reply.kind, reply.header["compiler"])
transport.close()
"""


@pytest.mark.recipe
def test_no_worker_imports_the_compiler_for_its_first_optimizer():
    script = OPTIMIZER.format(folder=os.path.dirname(__file__))
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines() == ["update False"] * 2


def test_an_answer_that_is_too_long_is_refused(connect):
    replies = ask(connect(sides("ab"), max_bytes=2000), fit())
    assert {reply.kind for _, reply in replies} == {"error"}
    assert "2000 that are accepted" in replies[0][1].header["reason"]


def test_the_clients_with_the_most_examples_begin_first(connect, tmp_path):
    clients = sides("abcdefgh")
    clients["d"].num_examples, clients["h"].num_examples = 100, 1000
    transport = connect(clients)
    mark = tmp_path / "begun"
    ask(transport, fit(seconds=dict.fromkeys("abcdefgh", 0.05), begun=str(mark)))
    begun = mark.read_text()
    assert set(begun[:2]) == {"d", "h"}
    # Clients of one size begin in the order of their requests, in two processes.
    assert sorted(begun[2:4]) == ["a", "b"]
    assert sorted(begun) == list("abcdefgh")


def test_the_default_engine_starts_workers_when_the_work_takes_long(connect):
    clients = sides()
    transport = connect(clients, patience=0.1)
    ask(transport, fit())
    assert transport.num_workers == 0
    ask(transport, fit(seconds={"a": 0.1}))
    answers = ask(transport, fit())
    assert transport.num_workers == 2
    assert {reply.header["asked"] for _, reply in answers} == {3}


def test_clients_compute_with_one_thread_in_this_process_too(connect):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for transport in (connect(sides("a"), patience=9.0), of_sides(sides("a"))):
            assert dict(ask(transport, fit()))["a"].header["threads"] == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_process_is_left_when_the_engine_is_closed():
    with open_engine(engine_settings({"kind": "processes", "workers": 1})) as engine:
        pids = {reply.header["pid"] for _, reply in ask(engine.connect(sides(), dict), fit())}
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_a_server_that_is_killed(connect):
    ours, theirs = os.pipe()
    server = os.fork()
    if not server:
        try:
            transport = ProcessTransport(sides(), 2)
            pids = {reply.header["pid"] for _, reply in ask(transport, fit())}
            os.write(theirs, " ".join(map(str, pids)).encode())
            # Both workers are busy when the server is killed.
            ask(transport, fit(seconds=dict.fromkeys("abcdefgh", 60)))
        finally:
            os._exit(1)
    pids = [int(pid) for pid in os.read(ours, 100).split()]
    os.close(ours)
    os.close(theirs)
    time.sleep(0.2)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    assert len(pids) == 2
    for _ in range(100):
        left = [pid for pid in pids if os.path.exists(f"/proc/{pid}") and not zombie(pid)]
        if not left:
            break
        time.sleep(0.05)
    assert left == []


def zombie(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_too_many_workers_are_refused(monkeypatch):
    monkeypatch.setattr(settings_module, "cores", lambda: 4)
    assert engine_settings("processes").number == 4
    assert engine_settings({"kind": "processes", "workers": 3}).number == 3
    sentence = r"engine.workers: got 5, but this process may use 4 cores; give at most engine="
    with pytest.raises(RecipeError, match=sentence):
        engine_settings({"kind": "processes", "workers": 5})


def test_a_gpu_needs_another_engine():
    clients = sides("a")
    clients["a"].common.model = nn.Linear(1, 1, device="meta")
    with pytest.raises(RunError, match=r"compute on the CPU, and the device is meta; give engine="):
        ProcessEngine(2).connect(clients, dict)
    assert isinstance(AutoEngine(ProcessEngine(2)).connect(clients, dict), StackedTransport)


@pytest.mark.parametrize("kind", [signal.SIGSTOP, None])
def test_a_worker_that_does_not_compute_is_told_once_and_not_ended(
    kind, connect, monkeypatch, caplog
):
    monkeypatch.setattr(pool_module, "CHECK", 0.02)
    monkeypatch.setattr(pool_module, "IDLE", 0.15)
    transport = connect(sides("ab"), workers=1)
    (_, reply), _ = ask(transport, fit())
    # Stopped by a signal; or it waits for something, here for a while.
    if kind:
        os.kill(reply.header["pid"], kind)
    number = transport.send("a", fit(seconds={} if kind else {"a": 0.8}))
    assert transport.receive([number], 0.5) is None
    told = [r.getMessage() for r in caplog.records if "has not computed" in r.getMessage()]
    assert len(told) == 1
    assert f"worker process {reply.header['pid']} has not" in told[0]
    assert "it worked for a: " + ("it is stopped; `kill -CONT" if kind else "it waits") in told[0]
    if kind:
        os.kill(reply.header["pid"], signal.SIGCONT)
    answer = transport.receive([number])
    assert (answer[2].header["asked"], answer[2].header["pid"]) == (2, reply.header["pid"])


def test_a_worker_that_computes_is_not_told(connect, monkeypatch, caplog):
    monkeypatch.setattr(pool_module, "CHECK", 0.02)
    monkeypatch.setattr(pool_module, "IDLE", 0.15)

    class Busy(Side):
        def answer(self, message):
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            return super().answer(message)

    ask(connect({"a": Busy("a")}, workers=1), fit())
    assert "has not computed" not in caplog.text


@pytest.mark.parametrize("problem", [BlockingIOError(11, "no more"), OSError(24, "Too many files")])
def test_a_system_that_gives_no_process_is_told_with_the_way_round(problem, connect, monkeypatch):
    def refused():
        raise problem

    transport = connect(sides("a"))
    monkeypatch.setattr(os, "fork", refused)
    with pytest.raises(
        RunError, match=r"engine: the system gives no worker process .*engine=\"local\""
    ):
        ask(transport, fit())


def test_a_daemon_of_multiprocessing_works_without_workers(monkeypatch):
    monkeypatch.setattr(settings_module, "cores", lambda: 2)
    with open_engine(engine_settings("auto")) as engine:
        assert engine.processes is not None
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with open_engine(engine_settings("auto")) as engine:
        assert engine.processes is None
    with (
        pytest.raises(RunError, match=r"a worker of `multiprocessing`.* give engine=\"local\""),
        open_engine(engine_settings("processes")),
    ):
        pass
