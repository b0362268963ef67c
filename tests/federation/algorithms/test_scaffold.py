"""SCAFFOLD against a plain twin, on quadratics whose optimum is known, with codecs, drop-outs, kills and privacy."""

import math
from dataclasses import replace

import pytest
import torch

from fedpress.codecs import Clip, Discretize, Key, Quantize, TopK
from fedpress.core import parameters
from fedpress.errors import RecipeError
from fedpress.federation import (
    Cohort,
    Downlink,
    FedAvg,
    Guarantee,
    LocalSettings,
    Momentum,
    Payload,
    Scaffold,
    SecureSum,
    Uplink,
)
from fedpress.federation.algorithms import check_fits
from fedpress.federation.local import LocalRun, Outcome, Step
from fedpress.federation.vectors import ExtraVector
from fedpress.privacy.plan import PrivacyPlan
from fedpress.secagg import SecurePlan
from fedpress.wire import Message, unpack
from tests.federation.algorithms.quadratics import SIZE, Quadratics
from tests.federation.federation import SAMPLE_PLAN, Federation, after, mlp

FAR = 0.3
"""How far FedAvg's fixed point is from the optimum here, at the least."""


def twin(going, num_rounds, *, server_lr=1.0):
    """Algorithm 1 of the paper with option II, in float64."""
    a, b = going.a.double(), going.b.double()
    x, c, own = torch.zeros(SIZE).double(), torch.zeros(SIZE).double(), torch.zeros_like(a)
    steps, lr, population = going.settings.epochs, going.settings.lr, len(a)
    for number in range(1, num_rounds + 1):
        drawn = going.cohort.draw(going.names, seed=7, round=number)
        cohort = [going.names.index(name) for name in drawn]
        moved, changed = [], []
        for i in cohort:
            y = x.clone()
            for _ in range(steps):
                y = y - lr * (a[i] * (y - b[i]) - own[i] + c)
            new = own[i] - c + (x - y) / (steps * lr)
            moved.append(y - x)
            changed.append(new - own[i])
            own[i] = new
        x = x + server_lr * torch.stack(moved).mean(0)
        c = c + len(cohort) / population * torch.stack(changed).mean(0)
    return x, c


@pytest.mark.parametrize(
    "cohort", [Cohort(4, 4), Cohort(2, 4), Cohort(1, 4), Cohort(2, 4, "cyclic")]
)
def test_rounds_equal_the_plain_twin(cohort):
    going = Quadratics(Scaffold(), cohort=cohort)
    last = going.run(12)[-1]
    x, c = twin(going, 12)
    torch.testing.assert_close(last.params.double(), x, rtol=0, atol=3e-6)
    torch.testing.assert_close(
        last.server_state["optimizer/control"].double(), c, rtol=0, atol=3e-6
    )


@pytest.mark.recipe
def test_it_finds_the_optimum_of_uneven_quadratics_and_fedavg_does_not():
    scaffold, fedavg = (Quadratics(a).run(80)[-1].params for a in (Scaffold(), FedAvg()))
    optimum = Quadratics(FedAvg()).optimum
    assert float((scaffold - optimum).norm()) < 1e-4
    assert float((fedavg - optimum).norm()) > FAR


@pytest.mark.recipe
def test_with_a_part_of_the_clients_in_each_round_it_still_does():
    going = Quadratics(Scaffold(), cohort=Cohort(2, 4))
    assert float((going.run(100)[-1].params - going.optimum).norm()) < 1e-3


@pytest.mark.recipe
@pytest.mark.parametrize(
    "codecs", [(Quantize(bits=6),), (TopK(density=0.4),), (TopK(density=0.6), Quantize(bits=8))]
)
def test_a_lossy_codec_of_the_control_does_not_move_the_optimum(codecs):
    going = Quadratics(Scaffold(uplink=codecs))
    assert float((going.run(100)[-1].params - going.optimum).norm()) < 1e-2


def test_every_vector_has_its_own_codecs():
    going, seen = Quadratics(Scaffold(uplink=(TopK(density=0.4),))), []

    def watch(name, handle):
        def answer(request):
            seen.append(unpack(handle(request)).tensors)
            return handle(request)

        return answer

    going.run(1, change=watch)
    for tensors in seen:
        assert set(tensors) == {"values", "control/values"}
        assert int((tensors["values"] != 0).sum()) == SIZE
        assert int((tensors["control/values"] != 0).sum()) == 2


def gone(who, when):
    """Client `who` does its work in its rounds `when`, and its answer is lost."""

    def change(name, handle):
        def answer(request):
            reply = handle(request)
            if name == who and unpack(request).header["round"] in when:
                raise ConnectionError("lost")
            return reply

        return answer

    return change


@pytest.mark.parametrize("when", [{3}, {3, 4}, {1}, {2, 5, 6, 7}])
def test_an_answer_that_is_lost_moves_neither_side(when):
    going = Quadratics(Scaffold())
    records = going.run(9, change=gone("c1", when))
    assert [r.round for r in records if "c1" in r.refused] == sorted(when)
    kept = [going.memories[name].load(10)["state.control"] for name in going.names]
    control = records[-1].server_state["optimizer/control"]
    torch.testing.assert_close(torch.stack(kept).mean(0), control, rtol=0, atol=1e-5)


def test_a_client_that_lost_its_state_says_so_and_begins_anew():
    going = Quadratics(Scaffold())
    first = going.run(3)[-1]
    going.memories["c2"].rounds.clear()
    records = going.run(5, start=after(first))
    assert "has lost its state of round 3" in records[0].refused["c2"]
    assert not records[1].refused


@pytest.mark.parametrize("coded", [False, True], ids=["whole", "coded downlink"])
def test_going_on_after_a_kill_gives_the_bits_of_an_uninterrupted_run(coded):
    more = {}
    if coded:
        more["downlink"] = Downlink(SIZE, chain=(Quantize(bits=8),), first=(Quantize(bits=16),))
    cohort = Cohort(3, 4)
    whole = Quadratics(Scaffold(), cohort=cohort, **more).run(8)
    first = Quadratics(Scaffold(), cohort=cohort, **more)
    head = first.run(5)[-2]  # round 5 was answered, and the server did not live to save it
    again = Quadratics(Scaffold(), cohort=cohort, memories=first.memories, **more)
    tail = again.run(8, start=after(head))
    for a, b in zip(whole[4:], tail, strict=True):
        assert torch.equal(a.params, b.params)
        assert all(torch.equal(t, b.server_state[n]) for n, t in a.server_state.items())


@pytest.mark.recipe
def test_a_server_optimizer_takes_the_update_alone():
    going = Quadratics(Scaffold(server=Momentum(beta=0.5, lr=0.5)))
    assert float((going.run(100)[-1].params - going.optimum).norm()) < 1e-3


def private(noise, clip_norm=5.0, **how):
    return Quadratics(
        Scaffold(clip_norm=clip_norm), privacy=PrivacyPlan("client", 1.0, 1.0, noise), **how
    )


@pytest.mark.parametrize("trust", ["central", "local"])
def test_under_client_privacy_the_noise_of_both_vectors_costs_what_one_would(trust):
    """Normalised by its clip norm over its noise, a client moves both together by 1 / noise_multiplier."""
    up = private(3.0, trust=trust).uplink
    costs = []
    for codec, clip_norm in zip(up.vector_codecs, (1.0, 5.0), strict=True):
        if trust == "central":
            assert codec.bound.l2 == clip_norm
            std = codec.noise.plan.noise_std
        else:
            std = codec.chain[1].std
        costs.append((clip_norm / std) ** 2)
    assert sum(costs) ** -0.5 == pytest.approx(3.0)
    assert costs[0] == pytest.approx(costs[1])


def test_one_client_moves_the_normalised_vectors_by_at_most_one_over_the_multiplier():
    """What the ledger counts: the distance of neighbours over the noise, for both vectors together."""
    chance = torch.Generator().manual_seed(0)
    up, key = private(2.0, clip_norm=0.3).uplink, Key(7, 1, "c0")
    for _ in range(50):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 3, generator=chance))
        # A client that does not clip.
        sent = {
            name: scale * torch.randn(SIZE, generator=chance)
            for name in ("values", "control/values")
        }
        received = up.receive(sent, key)
        parts = [
            float(received[codec.name].double().norm()) / codec.noise.plan.noise_std
            for codec in up.vector_codecs
        ]
        assert math.hypot(*parts) <= 1 / 2.0 * (1 + 1e-6)


def test_noise_of_the_two_vectors_is_not_the_same():
    records = private(1.0, clip_norm=1.0).run(1, change=lambda name, handle: _silent)
    control = records[0].server_state["optimizer/control"]
    assert not torch.allclose(records[0].params, control)


def _silent(request):
    raise ConnectionError("gone")


def test_under_client_privacy_without_a_bound_the_control_is_refused_with_the_cure():
    with pytest.raises(RecipeError, match=r"'control' has no clip_norm.*clip_norm"):
        Quadratics(Scaffold(), privacy=PrivacyPlan("client", 1.0, 1.0, 1.0))


@pytest.mark.recipe
def test_without_noise_client_privacy_converges_with_clipped_controls():
    going = private(0.0, clip_norm=1.0)
    assert float((going.run(100)[-1].params - going.optimum).norm()) < 1e-2


def test_a_joint_step_is_refused():
    with pytest.raises(RecipeError, match="take one step together"):
        check_fits(Scaffold(), LocalSettings(), steps="joint", unit="sample")
    with pytest.raises(RecipeError, match="'control' beside the update"):
        Uplink.bind(
            Payload(3, extras=Scaffold().extras_up),
            Cohort(2, 2),
            weights="equal",
            guarantee=Guarantee(plan=SAMPLE_PLAN, trust="central"),
        )


def test_a_secure_sum_of_two_vectors_is_refused():
    aggregator = SecureSum(SecurePlan(cohort=4, bits=16), SIZE, 1000, ())
    chain = (Clip(clip_norm=1.0), Discretize(scale=10.0))
    with pytest.raises(RecipeError, match="adds one vector per client"):
        Uplink.bind(
            Payload(SIZE, chain=chain, extras={"control": ExtraVector(codecs=chain)}),
            Cohort(4, 4),
            aggregator=aggregator,
            weights="equal",
        )


def test_weights_by_examples_and_local_momentum_are_refused_with_the_cure():
    up = Uplink.bind(Payload(SIZE, extras=Scaffold().extras_up), Cohort(4, 4))
    with pytest.raises(RecipeError, match='set weights = "equal"'):
        replace(Quadratics(Scaffold()).terms, uplink=up)
    with pytest.raises(RecipeError, match="set momentum = 0"):
        Quadratics(Scaffold(), settings=LocalSettings(momentum=0.5))
    with pytest.raises(
        RecipeError, match=r"optimizer: got 'adamw', but 'scaffold' .* set optimizer"
    ):
        Quadratics(Scaffold(), settings=LocalSettings(optimizer="adamw"))


class Blind:
    """Work whose examples cannot be read, only its steps: as under sample privacy, where all but those is noised."""

    lr = 0.1

    def begin(self, model):
        return LocalRun(model, parameters.flatten(model), self.steps(model))

    def steps(self, model):
        gen, held = torch.Generator().manual_seed(5), list(model.parameters())
        for _ in range(4):
            gradients = [torch.randn(p.shape, generator=gen) for p in held]
            yield Step([p.detach() for p in held], gradients)
            with torch.no_grad():
                for p, g in zip(held, gradients, strict=True):
                    p.sub_(self.lr * g)
        return Outcome({"steps": 4})


def test_the_control_is_made_of_steps_and_the_servers_vectors_alone():
    model = mlp()
    size = parameters.Layout.of(model).size
    down = {"params": torch.zeros(size), "control": torch.ones(size)}
    state = {"control": torch.full((size,), 2.0)}
    vectors, after, _ = Scaffold().client_update(model, Blind(), down, state)
    torch.testing.assert_close(vectors["control"], -1 - vectors["update"] / (4 * 0.1))
    torch.testing.assert_close(after["control"], 2 + vectors["control"])


def test_under_sample_privacy_the_noise_names_control_and_state():
    def answer(control):
        federation = Federation(
            2,
            privacy=SAMPLE_PLAN,
            weights="equal",
            settings=LocalSettings(batch_size=4, lr=0.1),
            algorithm=Scaffold(),
        )
        tensors = {"params": federation.params, "control": torch.full((83,), control)}
        header = {"round": 1, "agreement": federation.agreement, "counted": 0}
        return federation.clients["c0"].answer(Message("fit", header, tensors)).tensors["values"]

    assert torch.equal(answer(0.0), answer(0.0))
    # Other noise, though the correction itself is too small to be seen.
    alike = torch.corrcoef(torch.stack([answer(0.0), answer(1e-20)]))[0, 1]
    assert abs(float(alike)) < 0.6
