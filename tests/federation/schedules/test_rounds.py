"""Server steps over the buffered schedule, and over rounds with deadlines: the loop with real clients."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fedpress.codecs import Quantize, TopK
from fedpress.core import parameters
from fedpress.core.random_source import private_stream
from fedpress.errors import RecipeError
from fedpress.federation import (
    SERVERS,
    Cohort,
    DiskState,
    Downlink,
    FedAvg,
    LocalSettings,
    Scaffold,
)
from fedpress.federation.aggregators.secure import SecureSum
from fedpress.federation.delays import Exponential, Lognormal
from fedpress.federation.schedules import Buffered, Synchronous
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.adaptive import AdaptiveClip
from fedpress.privacy.noise.factorization import Factorization
from fedpress.secagg import SecurePlan
from fedpress.transport import LocalTransport
from fedpress.transport import packed as packed_module
from fedpress.wire import pack, unpack
from tests.federation.federation import Federation, after, client_plan, key, run_rounds
from tests.reference import fedbuff

FEDBUFF = Buffered(buffer=3, concurrency=5)
UNEVEN = Lognormal(median=10.0, devices=1.0, tasks=0.3)
CLIENTS = 9


def run(federation, num_rounds, *, schedule=FEDBUFF, delays=UNEVEN, server="average", **more):
    more = {"algorithm": FedAvg(server=SERVERS[server]())} | more
    return run_rounds(federation, num_rounds, schedule=schedule, delays=delays, **more)


def federation(**more):
    return Federation(CLIENTS, **({"cohort": Cohort(3, CLIENTS), "weights": "equal"} | more))


def one_epoch(made, client, version, params):
    """Returns what one epoch of plain SGD changes, in float64; the batches are those of the task's own stream."""
    model, data = copy.deepcopy(made.model).double(), made.data[int(client[1:])]
    parameters.assign_(model, params)
    shuffle = key(client, version + 1).client_stream("shuffle")
    for index in shuffle.permutation(len(data)).split(4):
        loss = F.cross_entropy(model(data.x[index].double()), data.y[index])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.2 * g
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - params


@pytest.mark.recipe
@pytest.mark.parametrize("delays", [UNEVEN, Exponential(mean=3.0)], ids=lambda row: row.kind)
@pytest.mark.parametrize(("buffer", "concurrency"), [(3, 5), (1, 4), (4, 9)])
def test_buffered_steps_equal_the_plain_twin(buffer, concurrency, delays):
    made = federation(cohort=Cohort(buffer, CLIENTS), settings=LocalSettings(batch_size=4, lr=0.2))
    draws = 0

    def choose(busy):
        nonlocal draws
        if len(busy) == CLIENTS:
            return None
        draws += 1
        stream = private_stream(7, "cohort", draws)
        while (name := f"c{int(stream.integers(CLIENTS))}") in busy:
            pass
        return name

    expected = fedbuff(
        made.params,
        lambda client, version, params: one_epoch(made, client, version, params),
        steps=12,
        buffer=buffer,
        concurrency=concurrency,
        choose=choose,
        delay=lambda client, version: delays.draw(7, client, version + 1),
        weight=lambda staleness: 1 / math.sqrt(1 + staleness),
    )
    schedule = Buffered(buffer=buffer, concurrency=concurrency)
    records = list(run(made, 12, schedule=schedule, delays=delays))
    for record, params in zip(records, expected, strict=True):
        assert (record.params - params).abs().max() < 1e-6
    assert max(max(record.timing.staleness) for record in records) > 1
    assert (records[-1].params - made.params).abs().max() > 0.05


KINDS = {
    "plain": {},
    "error feedback": {"chain": (TopK(density=0.2),), "error_feedback": True},
    "client privacy": {"privacy": client_plan(Cohort(3, CLIENTS))},
}


def on_disk(made, folder):
    """Gives every client a memory that outlives the process."""
    for name, client in made.clients.items():
        made.clients[name] = replace(client, memory=DiskState(folder / name))
    return made


def alike(a, b):
    return (
        torch.equal(a.params, b.params)
        and (a.clients, a.refused, a.timing) == (b.clients, b.refused, b.timing)
        and (a.bytes_up, a.bytes_down) == (b.bytes_up, b.bytes_down)
    )


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_gives_the_same_bits(kind, tmp_path):
    whole = list(run(on_disk(federation(**KINDS[kind]), tmp_path / "whole"), 10, server="adam"))
    chance, last, records = random.Random(kind), None, []
    while len(records) < 10:
        # Only the last record and what clients wrote down survive. A kill comes between two answers of a client, in the
        # middle of a step: what was answered since the record is asked again.
        made = on_disk(federation(**KINDS[kind]), tmp_path / "killed")
        left = chance.randint(1, 9)

        def dying(handle):
            def answer(request):
                nonlocal left
                reply = handle(request)
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return reply

            return answer

        handlers = {name: dying(client.handle) for name, client in made.clients.items()}
        start = None if last is None else after(last)
        try:
            transport = LocalTransport(handlers)
            for last in run(made, 10, server="adam", transport=transport, start=start):
                records.append(last)
        except KeyboardInterrupt:
            continue
    assert all(alike(a, b) for a, b in zip(whole, records, strict=True))
    assert any(t for record in whole for t in record.timing.staleness)


def test_a_checkpoint_holds_each_version_at_work_once():
    record = list(run(federation(), 8))[-1]
    models = {n for n in record.server_state if n.startswith("outbox/") and n.endswith(".params")}
    tasks = set(record.server_state["schedule/tasks"].tolist())
    assert models == {f"outbox/{task}.params" for task in tasks}
    assert (
        len(record.server_state["schedule/tasks"]) == 5 - 1
    )  # who answered last is replaced later


def test_every_update_names_the_version_that_it_started_from():
    made, named = federation(), []

    def noted(name):
        def handle(request):
            reply = made.clients[name].handle(request)
            named.append((unpack(request).header["round"], unpack(reply).header["round"]))
            return reply

        return handle

    records = list(run(made, 6, transport=LocalTransport({n: noted(n) for n in made.clients})))
    assert all(asked == told for asked, told in named)
    staleness = [s for record in records for s in record.timing.staleness]
    assert [i // 3 + 1 - told for i, (_, told) in enumerate(named)] == staleness


def test_an_update_of_another_version_does_not_count():
    made = federation()

    first = made.clients["c0"].handle(pack(made.fit()))
    handlers = {n: c.handle for n, c in made.clients.items()} | {"c0": lambda request: first}
    refused = [r.refused for r in run(made, 12, transport=LocalTransport(handlers))]
    reasons = [reasons["c0"] for reasons in refused if "c0" in reasons]
    assert reasons
    assert all("update.round: got 1, expected" in reason for reason in reasons)


def test_a_buffer_of_answers_that_do_not_count_changes_nothing_and_the_schedule_goes_on():
    made = federation()

    def dead(request):
        raise OSError("gone")

    broken = list(run(made, 3, transport=LocalTransport(dict.fromkeys(made.clients, dead))))
    whole = list(run(federation(), 3))
    assert all(torch.equal(record.params, made.params) for record in broken)
    assert [len(record.refused) for record in broken] == [3, 3, 3]
    assert [r.timing for r in broken] == [r.timing for r in whole]


def test_under_client_privacy_a_step_divides_by_the_buffer_and_adds_the_whole_noise():
    plan = client_plan(Cohort(3, CLIENTS), noise=2.0)
    made = federation(privacy=plan)

    def dead(request):
        raise OSError

    record = next(run(made, 1, transport=LocalTransport(dict.fromkeys(made.clients, dead))))
    step = record.params - made.params
    assert step.std().item() == pytest.approx(2.0 * 0.5 / 3, rel=0.3)
    assert record.clients == []


def test_a_client_that_sends_anything_moves_a_step_by_its_clip_norm_at_most():
    plan = client_plan(Cohort(3, CLIENTS), noise=0.0)
    honest = next(run(federation(privacy=plan), 1))
    for name in honest.timing.answered:
        made = federation(privacy=plan)

        def cheating(request, name=name, made=made):
            reply = unpack(made.clients[name].handle(request))
            reply.tensors["values"].mul_(-1e6)
            return pack(reply)

        handlers = {n: client.handle for n, client in made.clients.items()} | {name: cheating}
        record = next(run(made, 1, transport=LocalTransport(handlers)))
        moved = (record.params - honest.params).double().norm()
        assert 0 < moved <= 2 * plan.clip_norm / 3 + 1e-6  # it takes one update out and puts one in


def test_who_is_late_does_not_count_and_does_no_work():
    made, asked = federation(cohort=Cohort(CLIENTS, CLIENTS)), set()

    def noted(name):
        return lambda request: asked.add(name) or made.clients[name].handle(request)

    transport = LocalTransport({name: noted(name) for name in made.clients})
    record = next(run(made, 1, schedule=Synchronous(deadline=8.0), transport=transport))
    due = {name: UNEVEN.draw(7, name, 1) for name in made.clients}
    slow = {name for name, seconds in due.items() if seconds > 8}
    assert 0 < len(slow) < CLIENTS
    assert record.refused.keys() == slow
    assert all(reason.startswith("late: ") for reason in record.refused.values())
    assert asked == due.keys() - slow
    assert record.timing.simulated_seconds == 8.0
    assert transport.receive(range(100)) is None


def test_rounds_with_delays_but_no_deadline_give_the_bits_of_rounds_without():
    made = [federation() for _ in range(2)]
    for a, b in zip(
        run(made[0], 4, schedule=Synchronous()),
        run(made[1], 4, schedule=Synchronous(), delays=None),
        strict=True,
    ):
        assert torch.equal(a.params, b.params)
        assert a.clients == b.clients
        assert a.timing.simulated_seconds > 0
        assert b.timing.simulated_seconds is None


def test_over_selection_sums_the_first_answers_and_refuses_nobody():
    records = list(run(federation(), 3, schedule=Synchronous(over_selection=2.0)))
    for record in records:
        assert len(record.clients) == 3
        assert len(record.timing.spare) == 3
        assert not record.refused
        last = max(UNEVEN.draw(7, row["client"], record.round) for row in record.clients)
        first = min(UNEVEN.draw(7, name, record.round) for name in record.timing.spare)
        assert last <= first


def test_clients_with_coded_models_go_on_after_they_were_late():
    size = len(federation().params)
    downlink = Downlink(size, chain=(Quantize(bits=8),), first=(Quantize(bits=8),))
    made = federation(downlink=downlink)
    schedule = Synchronous(deadline=9.0)
    records = list(run(made, 8, schedule=schedule, downlink=downlink))
    late = {name for record in records for name in record.refused}
    counted = {row["client"] for record in records for row in record.clients}
    assert late & counted
    assert all("late" in why for record in records for why in record.refused.values())


SECURE = SecureSum(SecurePlan(10, 16), 83, 100, ())
MIXED = Factorization.plan(4, participations=4, min_separation=1, bands=2)
CORRELATED = ServerNoise(
    client_plan(Cohort(3, CLIENTS)),
    MIXED,
)
ADAPTIVE = AdaptiveClip(initial=1.0, count_noise=1.0)


@pytest.mark.parametrize(
    ("schedule", "changes", "words"),
    [
        (FEDBUFF, {"aggregator": SECURE}, "masks cancel only among clients"),
        (FEDBUFF, {"adaptive": ADAPTIVE}, "were sent an older clip norm"),
        (FEDBUFF, {"noise": CORRELATED}, "a fast client may be in every step"),
        (Synchronous(over_selection=1.5), {"aggregator": SECURE}, "plans noise and bits for"),
    ],
)
def test_what_a_schedule_cannot_give_is_refused_with_the_reason(schedule, changes, words):
    made = federation()
    uplink = replace(made.uplink, **changes)
    with pytest.raises(RecipeError, match=words):
        run(made, 1, schedule=schedule, uplink=uplink)


def test_over_selection_under_central_client_privacy_is_refused():
    made = federation(privacy=client_plan(Cohort(3, CLIENTS)))
    with pytest.raises(RecipeError, match="pushes another one out"):
        run(made, 1, schedule=Synchronous(over_selection=1.5))


def test_coded_differences_over_a_buffer_are_refused():
    made = federation()
    with pytest.raises(RecipeError, match="one model for each"):
        run(made, 1, downlink=Downlink(len(made.params)))


def test_an_algorithm_whose_clients_keep_a_state_is_refused_over_a_buffer():
    made = federation(algorithm=Scaffold(), settings=LocalSettings(batch_size=4))
    with pytest.raises(RecipeError, match="belongs to an older model"):
        run(made, 1, algorithm=Scaffold())


def test_a_model_is_packed_once_for_all_who_work_on_it_at_a_time(monkeypatch):
    packed, sent, send = [], [], LocalTransport.send
    monkeypatch.setattr(
        packed_module, "pack", lambda m: packed.append(m.header["round"]) or pack(m)
    )
    monkeypatch.setattr(
        LocalTransport, "send", lambda self, to, m: sent.append(m) or send(self, to, m)
    )
    list(run(federation(), 6))
    assert set(packed) == {1, 2, 3, 4, 5, 6}
    assert len(packed) <= 7 < 18 <= len(sent)  # once more where all who had it were done with it


def test_a_buffer_that_is_not_the_planned_cohort_is_refused():
    with pytest.raises(RecipeError, match="planned for 3 updates in one step"):
        run(federation(), 1, schedule=Buffered(buffer=4))
