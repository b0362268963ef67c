"""SCAFFOLD against a plain twin, on quadratics whose optimum is known, with codecs, drop-outs, kills and privacy."""

from itertools import islice

import pytest
import torch

from fedpress.codecs import Quantize, TopK
from fedpress.core.examples import Arrays
from fedpress.errors import RecipeError
from fedpress.federation import Cohort, Downlink, FedAvg, LocalSettings, Momentum, Scaffold, Uplink
from fedpress.federation.private import private_steps
from fedpress.federation.server import rounds
from fedpress.privacy.plan import PrivacyPlan
from fedpress.wire import unpack
from tests.federation.algorithms.quadratics import SIZE, Quadratics
from tests.federation.federation import SAMPLE_PLAN, Federation

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


@pytest.mark.parametrize("cohort", [Cohort(4, 4), Cohort(2, 4), Cohort(1, 4), Cohort(2, 4, "cyclic")])
def test_rounds_equal_the_plain_twin(cohort):
    going = Quadratics(Scaffold(), cohort=cohort)
    last = going.run(12)[-1]
    x, c = twin(going, 12)
    torch.testing.assert_close(last.params.double(), x, rtol=0, atol=3e-6)
    torch.testing.assert_close(last.server_state["optimizer/control"].double(), c, rtol=0, atol=3e-6)


def test_it_finds_the_optimum_of_uneven_quadratics_and_fedavg_does_not():
    scaffold, fedavg = (Quadratics(a).run(120)[-1].params for a in (Scaffold(), FedAvg()))
    optimum = Quadratics(FedAvg()).optimum
    assert float((scaffold - optimum).norm()) < 1e-4
    assert float((fedavg - optimum).norm()) > FAR


def test_with_a_part_of_the_clients_in_each_round_it_still_does():
    going = Quadratics(Scaffold(), cohort=Cohort(2, 4))
    assert float((going.run(400)[-1].params - going.optimum).norm()) < 1e-3


@pytest.mark.parametrize(
    "codecs", [(Quantize(bits=6),), (TopK(density=0.4),), (TopK(density=0.6), Quantize(bits=8))]
)
def test_a_lossy_codec_of_the_control_does_not_move_the_optimum(codecs):
    going = Quadratics(Scaffold(uplink=codecs))
    assert float((going.run(400)[-1].params - going.optimum).norm()) < 1e-2


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
    records = going.run(5, params=first.params, start=3, server_state=first.server_state)
    assert "does not hold its state of round 3" in records[0].refused["c2"]
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
    tail = again.run(8, params=head.params, start=4, server_state=head.server_state)
    for a, b in zip(whole[4:], tail, strict=True):
        assert torch.equal(a.params, b.params)
        assert all(torch.equal(t, b.server_state[n]) for n, t in a.server_state.items())


def test_a_server_optimizer_takes_the_update_alone():
    going = Quadratics(Scaffold(server=Momentum(beta=0.5, lr=0.5)))
    assert float((going.run(200)[-1].params - going.optimum).norm()) < 1e-3


def private(noise, clip_norm=5.0, **how):
    return Quadratics(
        Scaffold(clip_norm=clip_norm), privacy=PrivacyPlan("client", 1.0, 1.0, noise), **how
    )


@pytest.mark.parametrize("trust", ["central", "local"])
def test_under_client_privacy_the_noise_of_both_vectors_costs_what_one_would(trust):
    """Normalised by its clip norm over its noise, a client moves both together by 1 / noise_multiplier."""
    up = private(3.0, trust=trust).uplink
    costs = []
    for way, clip_norm in zip(up.ways, (1.0, 5.0), strict=True):
        if trust == "central":
            assert way.promise.l2 == clip_norm
            std = way.noise.plan.noise_std
        else:
            std = way.chain[1].std
        costs.append((clip_norm / std) ** 2)
    assert sum(costs) ** -0.5 == pytest.approx(3.0)
    assert costs[0] == pytest.approx(costs[1])


def test_one_client_moves_the_normalised_vectors_by_at_most_one():
    """What the ledger counts: the distance of neighbours over the noise, for both vectors together."""
    chance = torch.Generator().manual_seed(0)
    up = private(2.0, clip_norm=0.3).uplink
    for _ in range(50):
        scale = 10 ** float(torch.empty(()).uniform_(-3, 3, generator=chance))
        sent = {
            name: scale * torch.randn(SIZE, generator=chance) for name in ("update", "control")
        }
        key = Quadratics(FedAvg()).clients["c0"].terms and _key()
        received = up.receive(_unclipped(up, sent, key), key)
        distance = sum(
            float(received[way.name].double().norm() / way.noise.plan.noise_std) ** 2
            for way in up.ways
        )
        assert distance**0.5 <= 1 / 2.0 * (1 + 1e-6)


def _key():
    from fedpress.codecs import Key

    return Key(7, 1, "c0")


def _unclipped(up, sent, key):
    """The tensors of a client that does not clip."""
    return {"values": sent["update"], "control/values": sent["control"]}


def test_noise_of_the_two_vectors_is_not_the_same():
    records = private(1.0, clip_norm=1.0).run(1, change=lambda name, handle: _silent)
    control = records[0].server_state["optimizer/control"]
    assert not torch.allclose(records[0].params, control)


def _silent(request):
    raise ConnectionError("gone")


def test_under_client_privacy_without_a_bound_the_control_is_refused_with_the_cure():
    with pytest.raises(RecipeError, match="'control' has no bound.*clip_norm"):
        Quadratics(Scaffold(), privacy=PrivacyPlan("client", 1.0, 1.0, 1.0))


def test_without_noise_client_privacy_converges_with_clipped_controls():
    going = private(0.0, clip_norm=1.0)
    assert float((going.run(400)[-1].params - going.optimum).norm()) < 1e-2


@pytest.mark.parametrize("trust", ["central", "distributed"])
def test_a_joint_step_is_refused(trust):
    from fedpress.federation.algorithms import check_fits

    with pytest.raises(RecipeError, match="take one step together"):
        check_fits(Scaffold(), LocalSettings(), steps="joint", unit="sample")
    with pytest.raises(RecipeError, match="'control' beside the update"):
        Uplink.bind(
            3,
            Cohort(2, 2),
            privacy=SAMPLE_PLAN,
            trust="central",
            weights="equal",
            extras=Scaffold().extras_up,
        )
    del trust


def test_weights_by_examples_and_local_momentum_are_refused_with_the_cure():
    up = Uplink.bind(SIZE, Cohort(4, 4), extras=Scaffold().extras_up)
    going = Quadratics(Scaffold())
    with pytest.raises(RecipeError, match='set weights = "equal"'):
        type(going.terms)(
            going.terms.layout, going.settings, up, 7, going.terms.prepare, algorithm=Scaffold()
        )
    with pytest.raises(RecipeError, match="set momentum = 0"):
        Quadratics(Scaffold(), settings=LocalSettings(momentum=0.5))


def sample_federation(data_seed=0):
    federation = Federation(
        2,
        privacy=SAMPLE_PLAN,
        weights="equal",
        settings=LocalSettings(batch_size=4, lr=0.1),
        algorithm=Scaffold(),
    )
    del data_seed
    return federation


def test_under_sample_privacy_the_control_is_made_of_noised_steps_alone():
    """A client whose steps go where another's went sends the same control, whatever its examples are."""
    model = Federation().model

    class Blind:
        """Work whose examples cannot be read: only its steps, and they are given."""

        lr = 0.1

        def begin(self, model):
            from fedpress.federation.local import LocalRun, Outcome, Step

            def steps():
                gen = torch.Generator().manual_seed(5)
                for _ in range(4):
                    held = list(model.parameters())
                    grads = [torch.randn(p.shape, generator=gen) for p in held]
                    yield Step([p.detach() for p in held], grads)
                    with torch.no_grad():
                        for p, g in zip(held, grads, strict=True):
                            p.sub_(0.1 * g)
                return Outcome({"steps": 4})

            from fedpress.core import parameters

            return LocalRun(model, parameters.flatten(model), steps())

    size = sum(p.numel() for p in model.parameters())
    down = {"params": torch.zeros(size), "control": torch.ones(size)}
    vectors, _, _ = Scaffold().client_update(model, Blind(), down, {"control": torch.zeros(size)})
    assert set(vectors) == {"update", "control"}
    assert private_steps is not None


def test_under_sample_privacy_rounds_run_and_the_noise_names_control_and_state():
    federation = sample_federation()
    header = {"round": 1, "agreement": federation.agreement, "counted": 0}
    size = len(federation.params)

    def answer(control):
        from fedpress.wire import Message, pack

        federation_ = sample_federation()
        message = Message(
            "fit", header, {"params": federation_.params, "control": control.clone()}
        )
        return unpack(federation_.clients["c0"].handle(pack(message))).tensors

    base, again = answer(torch.zeros(size)), answer(torch.zeros(size))
    assert torch.equal(base["values"], again["values"])
    tiny = answer(torch.full((size,), 1e-20))
    # Other noise, though the correction itself is too small to be seen.
    assert abs(float(torch.corrcoef(torch.stack([base["values"], tiny["values"]]))[0, 1])) < 0.5
    del Arrays, islice, rounds
