import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch

from fedpress.core import parameters
from fedpress.errors import RecipeError
from fedpress.federation import SERVERS, Cohort, FedAvg, LocalSettings
from fedpress.federation.server import Start, rounds
from fedpress.transport import LocalTransport
from fedpress.wire import pack, unpack
from tests.federation.federation import SAMPLE_PLAN, Federation, after, client_plan, key, run_rounds
from tests.reference import fedavg

COHORT = Cohort(3, 5, "poisson")
KINDS = {
    "plain": {},
    "fixed cohort": {"cohort": Cohort(2, 5)},
    "sample": {"privacy": SAMPLE_PLAN},
    "client": {"cohort": COHORT, "privacy": client_plan(COHORT), "weights": "equal"},
}


def run(federation, num_rounds=4, *, server="average", **more):
    return run_rounds(federation, num_rounds, algorithm=FedAvg(server=SERVERS[server]()), **more)


def same(a, b):
    return torch.equal(a.params, b.params) and all(
        torch.equal(t, b.server_state[n]) for n, t in a.server_state.items()
    )


@pytest.mark.recipe
@pytest.mark.parametrize("clients", [3, 5])
@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_rounds_equal_the_plain_twin(clients, weights):
    settings = LocalSettings(epochs=2, batch_size=4, lr=0.2)
    federation = Federation(clients, weights=weights, settings=settings)
    twin = copy.deepcopy(federation.model)
    *_, last = run(federation, 5)

    def batches(client, round):
        n, shuffle = len(federation.data[client]), key(f"c{client}", round).client_stream("shuffle")
        return [i for _ in range(2) for i in shuffle.permutation(n).split(4)]

    numbers = [len(d) if weights == "examples" else 1 for d in federation.data]
    fedavg(
        twin,
        [(d.x, d.y) for d in federation.data],
        rounds=5,
        lr=0.2,
        batches=batches,
        weights=numbers,
    )
    assert (last.params - parameters.flatten(twin)).abs().max() < 1e-6
    assert (last.params - federation.params).abs().max() > 0.05


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_give_the_same_bits(kind):
    one, two = (list(run(Federation(5, **KINDS[kind]))) for _ in range(2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert [r.clients for r in one] == [r.clients for r in two]
    assert not torch.equal(one[-1].params, one[0].params)


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", SERVERS)
def test_going_on_from_a_record_gives_the_bits_of_an_uninterrupted_run(kind, server):
    whole = list(run(Federation(5, **KINDS[kind]), server=server))
    stopped = next(islice(run(Federation(5, **KINDS[kind]), server=server), 1, None))
    rest = list(
        run(
            Federation(5, **KINDS[kind]),
            server=server,
            start=after(stopped),
        )
    )
    assert [r.round for r in rest] == [3, 4]
    assert all(same(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_a_record_is_not_changed_by_later_rounds():
    records = run(Federation(), server="adam")
    first = next(records)
    kept = first.params.clone(), {n: t.clone() for n, t in first.server_state.items()}
    list(records)
    assert torch.equal(first.params, kept[0])
    assert all(torch.equal(first.server_state[n], t) for n, t in kept[1].items())


class Backwards(LocalTransport):
    """Answers the last of the requests first."""

    def receive(self, requests, timeout=None):
        for request in sorted(requests, reverse=True):
            answer = super().receive([request])
            if answer is not None:
                return answer
        return None


@pytest.mark.recipe
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_replies_does_not_change_a_bit(kind):
    one, two = Federation(5, **KINDS[kind]), Federation(5, **KINDS[kind])
    handlers = {name: client.handle for name, client in two.clients.items()}
    for a, b in zip(run(one), run(two, transport=Backwards(handlers)), strict=True):
        assert same(a, b)
        assert a.clients == b.clients


def test_bytes_of_a_round_are_the_lengths_of_its_messages():
    federation, up, down = Federation(), [], []

    def spied(client):
        def handle(request):
            down.append(len(request))
            up.append(len(client.handle(request)))
            return client.handle(request)

        return handle

    transport = LocalTransport({name: spied(client) for name, client in federation.clients.items()})
    records = list(run(federation, 2, transport=transport))
    assert [r.bytes_down for r in records] == [sum(down[:4]), sum(down[4:])]
    assert [r.bytes_up for r in records] == [sum(up[:4]), sum(up[4:])]
    assert all(n > 4 * len(federation.params) for n in up + down)


def test_a_client_that_fails_is_dropped_from_the_round_and_not_the_run():
    federation = Federation()
    handlers = {name: client.handle for name, client in federation.clients.items()}
    good = handlers["c2"]

    def flaky(request):
        if unpack(request).header["round"] == 2:
            raise OSError("cable pulled")
        return good(request)

    records = list(run(federation, 3, transport=LocalTransport(handlers | {"c2": flaky})))
    assert [r.refused for r in records] == [{}, {"c2": "OSError: cable pulled"}, {}]
    assert [[row["client"] for row in r.clients] for r in records][1] == ["c0", "c1", "c3"]


def test_rows_say_what_each_client_did():
    row = next(run(Federation())).clients[1]
    assert row.keys() == {"client", "examples", "loss", "steps", "update_norm"}
    assert (row["client"], row["examples"], row["steps"]) == ("c1", 14, 4)


def test_rounds_without_a_usable_reply_leave_params_and_state_as_they_were():
    federation = Federation()

    def nan(request):
        reply = unpack(federation.clients["c0"].handle(request))
        reply.tensors["values"][0] = float("nan")
        return pack(reply)

    records = list(
        run(
            federation,
            2,
            server="adam",
            transport=LocalTransport(dict.fromkeys(federation.clients, nan)),
        )
    )
    assert all(torch.equal(r.params, federation.params) for r in records)
    assert all("NaN" in reason for r in records for reason in r.refused.values())
    assert [len(r.refused) for r in records] == [4, 4]
    assert not records[-1].server_state["optimizer/mean"].any()


def test_under_client_privacy_a_round_without_replies_is_a_step_of_noise():
    cohort = Cohort(1, 5, "poisson")
    federation = Federation(
        5, cohort=cohort, privacy=client_plan(cohort, noise=2.0), weights="equal"
    )

    def dead(request):
        raise OSError

    record = next(
        run(federation, transport=LocalTransport(dict.fromkeys(federation.clients, dead)))
    )
    step = record.params - federation.params
    assert step.std().item() == pytest.approx(2.0 * 0.5, rel=0.3)


def test_other_settings_on_the_server_are_refused_by_every_client():
    federation = Federation()
    other = replace(federation.terms, seed=8)
    record = next(rounds(other, federation.transport, Start(federation.params)))
    assert len(record.refused) == 4
    assert "fit.agreement" in record.refused["c0"]


def test_what_does_not_fit_is_an_error_before_the_first_round():
    federation = Federation()
    with pytest.raises(RecipeError, match=r"^params: "):
        run(federation, start=Start(federation.params[1:]))
    with pytest.raises(RecipeError, match=r"^params: "):
        run(federation, start=Start(federation.params.double()))
    with pytest.raises(RecipeError, match=r"^transport: planned for 4 clients, there are 5"):
        run(federation, transport=Federation(5).transport)


def test_a_finished_run_has_no_more_rounds():
    federation = Federation(num_rounds=3)
    records = list(rounds(federation.terms, federation.transport, Start(federation.params)))
    assert [record.round for record in records] == [1, 2, 3]
    assert list(rounds(federation.terms, federation.transport, after(records[-1]))) == []


def test_federated_training_learns():
    federation = Federation(4, settings=LocalSettings(epochs=5, batch_size=4, lr=0.2))
    records = list(run(federation, 10))
    losses = [sum(row["loss"] for row in r.clients) for r in records]
    assert losses[-1] < 0.7 * losses[0]
