"""What holds for every algorithm of the table."""

import math
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedpress.errors import RecipeError
from fedpress.federation import (
    ALGORITHMS,
    Adam,
    AnyAlgorithm,
    Cohort,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    LocalSettings,
    Momentum,
)
from fedpress.federation.algorithms import AlgorithmRow, RoundInfo, check_fits
from fedpress.federation.vectors import ExtraVector
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire import Message, pack, unpack
from tests.federation.algorithms.quadratics import SIZE, Quadratics
from tests.federation.federation import SAMPLE_PLAN, Federation, after, run_rounds

ROWS = [row() for row in ALGORITHMS.values()]
KINDS = [row.kind for row in ROWS]


@pytest.fixture(params=ROWS, ids=KINDS)
def row(request):
    return request.param


def test_a_recipe_names_every_row_alone_or_in_a_table(row):
    read = TypeAdapter(AnyAlgorithm).validate_python
    assert read(row.kind) == read({"kind": row.kind}) == row
    with pytest.raises(ValidationError, match="fedavg"):
        read("fedsgd")
    with pytest.raises(ValidationError, match="colour"):
        read({"kind": row.kind, "colour": 1})


def test_two_runs_give_the_same_bits(row):
    one, two = (Quadratics(row, cohort=Cohort(2, 4)).run(4) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.params, b.params)
        assert a.server_state.keys() == b.server_state.keys()
    assert not torch.equal(one[0].params, one[-1].params)


def test_going_on_from_a_record_gives_the_bits_of_an_uninterrupted_run(row):
    whole = Quadratics(row).run(6)
    first = Quadratics(row)
    head = first.run(3)[-1]
    again = Quadratics(row, memories=first.memories)
    tail = again.run(6, start=after(head))
    assert all(torch.equal(a.params, b.params) for a, b in zip(whole[3:], tail, strict=True))


def test_every_vector_that_is_announced_comes_with_its_size(row):
    going, seen = Quadratics(row), []

    def watch(name, handle):
        def answer(request):
            reply = handle(request)
            seen.append((unpack(request).tensors, unpack(reply).tensors))
            return reply

        return answer

    going.run(2, change=watch)
    for down, up in seen:
        assert set(down) == {"params", *row.extras_down}
        assert set(up) == {"values", *(f"{name}/values" for name in row.extras_up)}
        for name, extra in row.extras_down.items():
            assert down[name].shape == (extra.size or SIZE,)
        for name, extra in row.extras_up.items():
            assert up[f"{name}/values"].shape == (extra.size or SIZE,)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_a_server_step_changes_nothing_that_it_was_given(row, size, value):
    params = torch.linspace(-1, 1, size)
    mean = {name: torch.full((size,), value) for name in ("update", *row.extras_up)}
    state = row.server_init(params)
    kept = {n: t.clone() for n, t in state.items()}, params.clone()
    after, moved = row.server_step(state, params, mean, RoundInfo(1, 2, 4))
    assert all(torch.equal(state[n], t) for n, t in kept[0].items())
    assert torch.equal(params, kept[1])
    assert after.keys() == state.keys()
    assert moved.shape == params.shape
    assert torch.equal(moved, params) is (value == 0)


def test_an_update_of_zero_moves_nothing(row):
    params = torch.ones(4)
    mean = {name: torch.zeros(4) for name in ("update", *row.extras_up)}
    _, moved = row.server_step(row.server_init(params), params, mean, RoundInfo(1, 1, 1))
    assert torch.equal(moved, params)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_refused_and_the_rest_counts(row, bad):
    going = Quadratics(row)

    def spoil(name, handle):
        def answer(request):
            message = unpack(handle(request))
            last = sorted(message.tensors)[0 if row.extras_up else -1]
            tensors = {**message.tensors, last: torch.full_like(message.tensors[last], bad)}
            return pack(Message("update", message.header, tensors))

        return answer if name == "c1" else handle

    (record,) = going.run(1, change=spoil)
    assert set(record.refused) == {"c1"}
    assert "NaN or infinity" in record.refused["c1"]
    assert torch.isfinite(record.params).all()


@pytest.mark.parametrize(
    ("change", "always"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if "/" not in n}, False),
        (lambda tensors: {**tensors, "other/values": torch.zeros(SIZE)}, True),
        (lambda tensors: {n: torch.zeros(2) for n in tensors}, True),
    ],
    ids=["missing", "unknown", "short"],
)
def test_a_message_with_other_vectors_than_announced_is_refused(row, change, always):
    going = Quadratics(row)

    def changed(name, handle):
        def answer(request):
            message = unpack(handle(request))
            return pack(Message("update", message.header, change(message.tensors)))

        return answer if name == "c0" else handle

    (record,) = going.run(1, change=changed)
    assert set(record.refused) == ({"c0"} if always or row.extras_up else set())


def test_a_row_with_further_vectors_needs_a_bound_for_each_under_client_privacy(row):
    plan = PrivacyPlan("client", 1.0, 1.0, 1.0)
    if row.extras_up:
        with pytest.raises(RecipeError, match="give it a clip_norm"):
            Quadratics(row, privacy=plan)
    else:
        assert len(Quadratics(row, privacy=plan).uplink.vector_codecs) == 1


def test_a_row_that_corrects_several_steps_is_refused_for_a_joint_one(row):
    if row.corrects_gradients:
        with pytest.raises(RecipeError, match="take one step together"):
            check_fits(row, LocalSettings(), steps="joint", unit="sample")
    elif not row.reads_loss:
        check_fits(row, LocalSettings(), steps="joint", unit="sample")


def test_a_row_that_asks_for_a_loss_is_refused_for_unit_sample(row):
    if row.reads_loss:
        with pytest.raises(RecipeError, match="which gets no noise"):
            check_fits(row, LocalSettings(), steps="local", unit="sample")
    elif not row.corrects_gradients:
        check_fits(row, LocalSettings(), steps="local", unit="sample")


def test_what_is_equal_to_another_row_gives_its_bits():
    pairs = [
        (FedAvgM(lr=0.5, beta=0.8), FedAvg(server=Momentum(lr=0.5, beta=0.8))),
        (FedAdam(lr=0.1), FedAvg(server=Adam(lr=0.1))),
        (FedProx(proximal_mu=0.0), FedAvg()),
    ]
    for one, other in pairs:
        a, b = (Quadratics(row).run(4)[-1].params for row in (one, other))
        assert torch.equal(a, b), one


class WeighsByLoss(AlgorithmRow):
    """Sends the loss before training beside the update, as q-FedAvg does."""

    kind: Literal["weighs"] = "weighs"
    clip_norm: float | None = 5.0

    @property
    def extras_up(self):
        return {"loss": ExtraVector(size=1, clip_norm=self.clip_norm)}

    @property
    def reads_loss(self):
        return True

    def client_update(self, model, work, down, state):
        loss = torch.tensor([work.loss(model)])
        run = work.begin(model).finish()
        return {"update": run.update() * loss, "loss": loss}, state, run.measures

    def server_step(self, state, params, mean, info):
        return state, params + mean["update"] / mean["loss"].clamp(min=0.1)


@pytest.mark.parametrize("privacy", [None, PrivacyPlan("client", 1.0, 1.0, 0.5)])
def test_a_loss_travels_as_a_vector_of_size_one(privacy):
    federation = Federation(
        algorithm=WeighsByLoss(),
        weights="equal",
        privacy=privacy,
        settings=LocalSettings(batch_size=4),
    )
    (record,) = run_rounds(federation, 1)
    assert not record.refused
    assert torch.isfinite(record.params).all()
    assert not torch.equal(record.params, federation.params)


def test_a_row_that_asks_for_a_loss_is_refused_under_sample_privacy_before_the_run():
    with pytest.raises(RecipeError, match="which gets no noise"):
        Federation(algorithm=WeighsByLoss(), weights="equal", privacy=SAMPLE_PLAN)
