"""The schedules without a virtual clock, over a transport whose clients really work at the same time."""

import copy
import threading
import time

import pytest
import torch

from fedpress.federation import Cohort
from fedpress.federation.exchange import Traffic, error, exchange
from fedpress.federation.schedules import Buffered, Synchronous
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import Federation, rebound, run_rounds


class Threads:
    """A thread for each request; answers come when they come."""

    def __init__(self, handlers):
        self._handlers, self._changed = handlers, threading.Condition()
        self._open, self._answers, self._sent, self.traffic = set(), {}, 0, Traffic()
        self.threads = []

    def clients(self):
        return list(self._handlers)

    def send(self, client, message):
        data = pack(message)
        with self._changed:
            self._sent += 1
            self._open.add(self._sent)
            self.traffic += Traffic(down=len(data))
        self.threads.append(threading.Thread(target=self._work, args=(self._sent, client, data)))
        self.threads[-1].start()
        return self._sent

    def _work(self, request, client, data):
        try:
            reply = self._handlers[client](data)
        except Exception as problem:
            reply = pack(error(f"{type(problem).__name__}: {problem}"))
        with self._changed:
            self.traffic += Traffic(up=len(reply))
            if request in self._open:
                self._answers[request] = client, unpack(reply)
            self._changed.notify_all()

    def receive(self, requests, timeout=None):
        def first():
            return next((r for r in self._answers if r in requests), None)

        with self._changed:
            self._changed.wait_for(lambda: first() or not self._open & set(requests), timeout)
            request = first()
            if request is None:
                return None
            self._open.discard(request)
            client, reply = self._answers.pop(request)
            return client, request, reply

    def cancel(self, requests):
        with self._changed:
            self._open -= set(requests)
            for request in requests:
                self._answers.pop(request, None)


def slowed(made, seconds):
    """Returns a transport to the clients of `made`, each with a model of its own, that take so long for a task."""

    def handler(name, client):
        def handle(request):
            if unpack(request).kind == "fit":
                time.sleep(seconds.get(name, 0.0))
            return client.handle(request)

        return handle

    own = {n: rebound(c, model=copy.deepcopy(c.model)) for n, c in made.clients.items()}
    return Threads({name: handler(name, client) for name, client in own.items()})


def ended(transport):
    for thread in transport.threads:
        thread.join()


def test_rounds_over_a_real_transport_give_the_bits_of_the_simulation():
    made = Federation(5, cohort=Cohort(3, 5))
    transport = slowed(made, {"c0": 0.05, "c3": 0.02})
    real = list(run_rounds(made, 3, transport=transport))
    ended(transport)
    simulated = list(run_rounds(made, 3))
    for a, b in zip(real, simulated, strict=True):
        assert torch.equal(a.params, b.params)
        assert (a.clients, a.bytes_up, a.bytes_down) == (b.clients, b.bytes_up, b.bytes_down)


@pytest.mark.recipe
def test_a_late_update_is_never_taken_for_the_answer_of_another_round():
    # What a process does once, such as torch's first step, takes longer than the deadline.
    list(run_rounds(Federation(1), 1))
    made = Federation(3, schedule=Synchronous(deadline=0.6))
    transport = slowed(made, {"c1": 1.0})
    first, second = list(run_rounds(made, 2, transport=transport))
    assert list(first.refused) == ["c1"]
    assert "no reply came" in first.refused["c1"]
    assert list(second.refused) == ["c1"]  # what it did for round 1 came in round 2
    assert [row["client"] for row in second.clients] == ["c0", "c2"]
    ended(transport)
    assert transport.receive(range(99)) is None


@pytest.mark.recipe
def test_over_selection_takes_whoever_is_first():
    made = Federation(4, cohort=Cohort(2, 4), schedule=Synchronous(over_selection=2.0))
    transport = slowed(made, {"c0": 1.5, "c2": 1.5})
    (record,) = run_rounds(made, 1, transport=transport)
    assert sorted(row["client"] for row in record.clients) == ["c1", "c3"]
    assert record.timing.spare == ("c0", "c2")
    assert not record.refused
    ended(transport)


@pytest.mark.recipe
def test_a_slow_client_holds_nobody_up_in_a_buffer():
    schedule = Buffered(buffer=2, concurrency=4)
    made = Federation(4, cohort=Cohort(2, 4), weights="equal", schedule=schedule)
    transport = slowed(made, {"c0": 1.0})
    records = list(run_rounds(made, 6, transport=transport))
    assert len(records) == 6
    assert sum(record.timing.answered.count("c0") for record in records) <= 2
    assert not any(record.refused for record in records)
    ended(transport)


def test_other_questions_go_through_while_clients_are_at_work():
    made = Federation(2)
    transport = slowed(made, {"c0": 0.3, "c1": 0.3})
    fits = [transport.send(name, made.fit()) for name in made.clients]
    asked = dict(exchange(transport, {name: Message("hello") for name in made.clients}))
    assert all(reply.kind == "error" for reply in asked.values())
    assert all(transport.receive(fits)[2].kind == "update" for _ in fits)
    ended(transport)
