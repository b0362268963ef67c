import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedpress.codecs import Key, Quantize, TopK
from fedpress.core import parameters
from fedpress.core.examples import Arrays
from fedpress.errors import RecipeError, TrainingError, WireError
from fedpress.federation import (
    Cohort,
    Downlink,
    Guarantee,
    InMemoryState,
    LocalSettings,
    Payload,
    Uplink,
)
from fedpress.federation.downlink import SERVER
from fedpress.federation.local import plain_steps
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import SAMPLE_PLAN, Federation, client_plan, mlp, rebound


def answer(federation, message=None, name="c0"):
    return unpack(federation.clients[name].handle(pack(message or federation.fit())))


def with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    model[1].running_mean += 0.5
    return model


def test_the_update_is_the_trained_client_minus_the_server():
    federation = Federation()
    reply = answer(federation)
    assert reply.kind == "update"
    assert torch.equal(
        reply.tensors["values"], parameters.flatten(federation.model) - federation.params
    )
    assert reply.tensors["values"].norm() > 0


def test_without_privacy_an_update_says_examples_loss_and_steps():
    reply = answer(Federation())
    assert reply.header.keys() == {"round", "examples", "loss", "steps"}
    assert (reply.header["round"], reply.header["examples"], reply.header["steps"]) == (1, 10, 3)


def test_under_sample_privacy_nothing_leaves_beside_the_noised_update_and_public_numbers():
    reply = answer(Federation(privacy=SAMPLE_PLAN))
    noised = reply.header["failures"]
    assert reply.header == {"round": 1, "examples": 10, "steps": 4, "failures": noised}
    assert all(count != round(count) for count in noised)
    assert list(reply.tensors) == ["values"]


def test_under_client_privacy_only_the_clipped_update_leaves():
    privacy = client_plan(Cohort(4, 4), clip_norm=1e-3)
    reply = answer(Federation(privacy=privacy, weights="equal"))
    assert reply.header == {"round": 1}
    assert 0.9e-3 < float(reply.tensors["values"].double().norm()) <= 1e-3


def test_the_same_request_gives_the_same_bytes_whatever_happened_before():
    federation = Federation(model=with_batch_norm())
    first = federation.clients["c0"].handle(pack(federation.fit(3)))
    for name in federation.clients:
        federation.clients[name].handle(pack(federation.fit(4)))
    torch.rand(17)
    assert federation.clients["c0"].handle(pack(federation.fit(3))) == first
    assert federation.clients["c0"].handle(pack(federation.fit(4))) != first


def test_fitting_leaves_the_global_randomness_alone():
    federation = Federation(model=with_batch_norm())
    before = torch.get_rng_state()
    answer(federation)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_between_rounds_and_clients():
    federation = Federation(model=with_batch_norm(), settings=LocalSettings(batch_size=10))
    replies = [answer(federation), answer(federation, federation.fit(2))]
    assert not torch.equal(replies[0].tensors["values"], replies[1].tensors["values"])


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_buffers_are_the_same_before_and_after_and_never_travel(norm):
    model = with_batch_norm()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    federation = Federation(model=model, norm=norm)
    reply = answer(federation)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert reply.tensors["values"].numel() == sum(p.numel() for p in model.parameters())


def test_frozen_batch_norm_uses_fixed_statistics_and_trains_scale_and_bias():
    frozen, batch = with_batch_norm(), with_batch_norm()
    updates = [
        answer(Federation(model=m, norm=n)).tensors["values"]
        for m, n in ((frozen, "frozen"), (batch, "batch"))
    ]
    assert not torch.equal(*updates)
    assert not torch.equal(frozen[1].weight, torch.ones(8))


def test_only_trainable_parameters_travel():
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    federation = Federation(model=model)
    assert answer(federation).tensors["values"].shape == (8 + 24 + 3,)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: Message("update", m.header, m.tensors), r"fit\.kind: got 'update'"),
        (
            lambda m: Message("fit", {**m.header, "agreement": "other"}, m.tensors),
            r"fit\.agreement",
        ),
        (lambda m: Message("fit", {**m.header, "round": 0}, m.tensors), r"fit\.round: got 0"),
        (lambda m: Message("fit", {**m.header, "round": "1"}, m.tensors), r"fit\.round: got '1'"),
        (lambda m: Message("fit", m.header), r"fit\.params"),
        (
            lambda m: Message("fit", m.header, {"params": m.tensors["params"].double()}),
            r"fit\.params",
        ),
        (
            lambda m: Message("fit", m.header, {"params": m.tensors["params"] * float("nan")}),
            r"fit\.params",
        ),
        (
            lambda m: Message("fit", m.header, {"params": m.tensors["params"][1:]}),
            r"\[82\]|82 values|shape",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_field(change, field):
    federation = Federation()
    with pytest.raises(WireError, match=field):
        answer(federation, change(federation.fit()))


def test_settings_the_model_and_the_uplink_are_part_of_the_agreement():
    plain = Federation()
    others = [
        Federation(settings=LocalSettings(batch_size=4, momentum=0.5, lr=0.06)),
        Federation(weights="equal"),
        Federation(privacy=SAMPLE_PLAN),
        Federation(model=nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))),
        Federation(seed=8),
        Federation(norm="batch"),
    ]
    assert len({f.agreement for f in [plain, *others]}) == 7
    assert plain.agreement == Federation().agreement


def test_diverged_training_is_an_error():
    federation = Federation(settings=LocalSettings(lr=1e30, epochs=5))
    with pytest.raises(TrainingError, match="not finite"):
        answer(federation)


def test_under_privacy_a_failure_does_not_tell_on_what_it_failed():
    def broken(x, generator):
        raise ValueError(f"bad pixel {x[0, 0]}")

    with pytest.raises(ValueError, match="bad pixel"):
        answer(Federation(prepare=broken))
    with pytest.raises(TrainingError, match="failed with ValueError; the cause is hidden"):
        answer(Federation(prepare=broken, privacy=SAMPLE_PLAN))
    # Where clients are protected it sends an update of zero, and a trusted server counts it, with noise.
    reply = answer(Federation(prepare=broken, privacy=client_plan(Cohort(4, 4)), weights="equal"))
    assert reply.header == {"round": 1, "failures": [0.0, 1.0]}
    assert not reply.tensors["values"].any()


@pytest.mark.parametrize("privacy", [SAMPLE_PLAN, client_plan(Cohort(4, 4))])
def test_under_privacy_a_client_answers_one_question_a_round_and_none_beyond_the_plan(privacy):
    federation = Federation(
        privacy=privacy, weights="equal" if privacy.unit == "client" else "examples", num_rounds=2
    )
    first = federation.clients["c0"].handle(pack(federation.fit(1)))
    assert federation.clients["c0"].handle(pack(federation.fit(1))) == first
    other = replace(federation.fit(1), tensors={"params": federation.params + 1})
    with pytest.raises(WireError, match="has answered a different request"):
        answer(federation, other)
    answer(federation, federation.fit(2))
    with pytest.raises(WireError, match="planned for 2 rounds"):
        answer(federation, federation.fit(3))


def test_training_mode_batch_norm_under_sample_privacy_is_refused():
    with pytest.raises(RecipeError, match=r"^norm: "):
        Federation(model=with_batch_norm(), norm="batch", privacy=SAMPLE_PLAN)
    assert answer(Federation(model=with_batch_norm(), privacy=SAMPLE_PLAN)).kind == "update"


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(RecipeError, match="both need a privacy plan"):
        Federation(plan=SAMPLE_PLAN)
    with pytest.raises(RecipeError, match="both need a privacy plan"):
        Federation(privacy=SAMPLE_PLAN, plan=None)
    with pytest.raises(RecipeError, match="weight_decay"):
        Federation(privacy=SAMPLE_PLAN, settings=LocalSettings(weight_decay=0.1))
    federation, nothing = Federation(), Arrays(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(RecipeError, match=r"^client 'c0': it has no examples"):
        replace(federation.clients["c0"], arrays=nothing)
    private = Federation(privacy=SAMPLE_PLAN)
    joint = Uplink.bind(
        Payload(len(private.params)),
        Cohort(4, 4),
        guarantee=Guarantee(plan=SAMPLE_PLAN, trust="central"),
    )
    assert rebound(private.clients["c0"], uplink=joint).uplink.trust.steps == "joint"
    with pytest.raises(RecipeError, match="another source is not possible"):
        rebound(private.clients["c0"], uplink=joint, source=plain_steps)
    with pytest.raises(RecipeError, match=r"trains 3 values but the uplink is for 83"):
        rebound(federation.clients["c0"], model=nn.Linear(2, 1))


class Remembers(nn.Module):
    """Keeps a running mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


def test_what_a_module_remembers_is_forgotten_after_every_round_also_after_a_failure():
    model = nn.Sequential(Remembers(), *mlp())
    federation = Federation(model=model)
    first = federation.clients["c0"].handle(pack(federation.fit()))
    assert torch.equal(model[0].mean, torch.zeros(6))
    assert federation.clients["c0"].handle(pack(federation.fit())) == first
    diverging = Federation(model=model, settings=LocalSettings(lr=1e30, epochs=5))
    with pytest.raises(TrainingError, match="not finite"):
        answer(diverging)
    assert torch.equal(model[0].mean, torch.zeros(6))
    private = Federation(model=nn.Sequential(Remembers(), *mlp()), privacy=SAMPLE_PLAN)
    assert answer(private).header["failures"][1] == pytest.approx(
        8, abs=8
    )  # examples in four steps, with noise
    assert torch.equal(private.model[0].mean, torch.zeros(6))


def coded():
    federation = Federation(clients=1)
    size = len(federation.params)
    downlink = Downlink(size, chain=(Quantize(bits=8),), first=(Quantize(bits=16),))
    client = rebound(
        federation.clients["c0"], downlink=downlink, error_feedback=True, memory=InMemoryState()
    )
    return federation, downlink, client


def coded_fit(federation, downlink, client, round, version, held):
    agreed = client.terms.agreement.fingerprint
    tensors = downlink.encode(federation.params, held, Key(7, round, SERVER))
    request = Message("fit", {"round": round, "agreement": agreed, "from": version}, tensors)
    return unpack(client.handle(pack(request)))


def test_a_client_says_when_it_does_not_hold_the_model_that_a_difference_is_to():
    federation, downlink, client = coded()
    coded_fit(federation, downlink, client, 1, 0, None)
    held = client.memory.load(2)["held"]
    assert torch.allclose(held, federation.params, atol=1e-3)
    coded_fit(federation, downlink, client, 2, 1, held)
    with pytest.raises(WireError, match="send the full model"):
        coded_fit(federation, downlink, client, 9, 5, held)
    for bad in (-1, 9, True, "1", None):
        with pytest.raises(WireError, match=r"fit\.from"):
            coded_fit(federation, downlink, client, 9, bad, held)


def test_error_feedback_adds_what_the_last_update_lost():
    federation = Federation(clients=1)
    uplink = Uplink.bind(Payload(len(federation.params), chain=(TopK(density=0.1),)), Cohort(1, 1))
    memory = InMemoryState()
    client = rebound(federation.clients["c0"], uplink=uplink, error_feedback=True, memory=memory)
    plain = rebound(client, error_feedback=False)
    federation.terms = client.terms
    sent = [
        unpack(client.handle(pack(federation.fit(round)))).tensors["values"] for round in (1, 2)
    ]
    federation.terms = plain.terms
    whole = []
    for round in (1, 2):
        plain.handle(pack(federation.fit(round)))
        whole.append(parameters.flatten(federation.model) - federation.params)
    lost = whole[0] - sent[0]
    assert torch.allclose(memory.load(2)["residual"], lost)
    kept = (whole[1] + lost).abs() >= (whole[1] + lost).abs().topk(
        int((sent[1] != 0).sum())
    ).values[-1]
    assert torch.allclose(sent[1], torch.where(kept, whole[1] + lost, torch.zeros(())))


def test_a_client_answers_no_more_tasks_than_are_planned():
    plan = client_plan(Cohort(1, 1))
    federation = Federation(1, privacy=plan, weights="equal", num_rounds=9, max_tasks=2)
    client = federation.clients["c0"]
    for task in (2, 5, 2):  # the same question again is no other task
        assert unpack(client.handle(pack(federation.fit(task)))).kind == "update"
    with pytest.raises(WireError, match="has answered 2 tasks, and privacy is planned for 2"):
        client.handle(pack(federation.fit(7)))
