"""Secure sums inside the rounds: the same model as with a plain sum, whoever vanishes, and nothing else seen."""

import json
import math
from itertools import islice

import pytest
import torch

from fedpress.codecs import Clip, Discretize, Quantize, RandomK, Rotate, TopK
from fedpress.core import parameters
from fedpress.core.random import secret_key
from fedpress.errors import RecipeError
from fedpress.federation import (
    Client,
    ClientPlan,
    Cohort,
    InMemoryState,
    LocalSettings,
    Payload,
    SecureSum,
    Terms,
    Traffic,
    Uplink,
)
from fedpress.federation.server import Start, rounds
from fedpress.secagg import SecAggClient, SecurePlan, identity
from fedpress.transport import LocalTransport
from fedpress.wire import Message, pack, unpack
from tests.federation.federation import GOAL, after, examples, mlp, untouched

NAMES = [f"c{i}" for i in range(6)]
SETTINGS = LocalSettings(batch_size=4)
CHAIN = (Clip(clip_norm=1.0), Rotate(block=16), Discretize(scale=200.0))


class SecureFederation:
    """Six clients that sum plainly or securely over one grid."""

    def __init__(self, *, secure=True, chain=CHAIN, bits=16, limit=None, memories=None):
        self.model = mlp()
        self.params, layout = parameters.flatten(self.model), parameters.Layout.of(self.model)
        keys = {name: secret_key(3, name) for name in NAMES}
        plan = SecurePlan(cohort=6, bits=bits)
        identities = tuple((name, identity(key)) for name, key in keys.items())
        size = len(self.params)
        aggregator = SecureSum(plan, size, limit or 2 ** (bits - 1), identities) if secure else None
        self.uplink = Uplink.bind(
            Payload(size, chain=chain), Cohort(6, 6), aggregator=aggregator, weights="equal"
        )
        self.terms = Terms(layout, SETTINGS, self.uplink, 7, untouched, GOAL)
        self.agreement = self.terms.agreement.fingerprint
        client_plan = ClientPlan.bind(self.terms, self.model)
        self.memories = memories or {name: InMemoryState() for name in NAMES}
        self.clients = {
            name: Client(
                name,
                examples(10 + i, seed=i),
                self.model,
                client_plan,
                memory=self.memories[name],
                member=SecAggClient(name, keys[name], plan, dict(identities), self.agreement)
                if secure
                else None,
            )
            for i, name in enumerate(NAMES)
        }

    def run(self, num_rounds=2, change=lambda name, handle: handle, start=None):
        transport = LocalTransport(
            {name: change(name, client.handle) for name, client in self.clients.items()}
        )
        start = start or Start(self.params)
        return list(islice(rounds(self.terms, transport, start), num_rounds - start.round))


def vanish(who, at):
    """Clients of `who` stop answering messages of the kind `at`."""

    def change(name, handle):
        def answer(request):
            if name in who and unpack(request).kind == at:
                raise ConnectionError("gone")
            return handle(request)

        return answer

    return change


def test_a_secure_round_equals_a_plain_round_to_the_bit_of_the_grid():
    secure, plain = SecureFederation().run(), SecureFederation(secure=False).run()
    for a, b in zip(secure, plain, strict=True):
        assert torch.allclose(a.params, b.params, atol=1e-7)
        assert not torch.equal(a.params, SecureFederation().params)
        assert (a.clients, a.refused) == ([], {})


@pytest.mark.parametrize("at", ["fit", "unmask"])
def test_clients_may_vanish_at_any_step(at):
    gone = {"c1", "c4"}
    secure = SecureFederation().run(change=vanish(gone, at))
    plain = SecureFederation(secure=False).run(change=vanish(gone if at == "fit" else set(), "fit"))
    assert all(
        torch.allclose(a.params, b.params, atol=1e-7) for a, b in zip(secure, plain, strict=True)
    )
    assert all(set(r.refused) == (gone if at == "fit" else set()) for r in secure)


@pytest.mark.parametrize("at", ["fit", "unmask"])
def test_too_few_survivors_keep_the_sum_closed(at):
    federation = SecureFederation()
    (record,) = federation.run(1, change=vanish({"c0", "c1", "c2"}, at))
    assert torch.equal(record.params, federation.params)
    assert set(record.refused) == set(NAMES)


def test_what_leaves_a_client_is_masked():
    seen = {}

    def watch(name, handle):
        def answer(request):
            reply = handle(request)
            message = unpack(reply)
            if message.kind == "update":
                seen[name] = message
            return reply

        return answer

    SecureFederation().run(1, change=watch)
    values = torch.stack([m.tensors["masked"].double() for m in seen.values()])
    assert -(2**15) <= float(values.min()) <= float(values.max()) < 2**15
    # Uniform, where the update is a few hundred.
    assert float(values.mean()) == pytest.approx(0, abs=0.05 * 2**15)
    assert float(values.std()) == pytest.approx(2**16 / math.sqrt(12), rel=0.05)
    assert all(m.header.keys() == {"round", "secure"} for m in seen.values())


def test_nonsense_from_one_client_is_seen_as_an_overflow_and_does_not_count():
    federation = SecureFederation(limit=2 * 6 * 201)

    def loud(name, handle):
        member = federation.clients[name].member
        if name != "c2" or getattr(member, "loud", False):
            return handle
        honest = member.mask
        member.mask = lambda values, **more: honest(values + 20_000, **more)
        return handle

    (record,) = federation.run(1, change=loud)
    assert torch.equal(record.params, federation.params)
    assert "overflowed" in record.refused["c0"]


@pytest.mark.recipe
def test_a_run_that_goes_on_with_kept_memories_gives_the_same_bits():
    whole = SecureFederation().run(3)
    first = SecureFederation()
    head = first.run(2)
    again = SecureFederation(memories=first.memories)
    for name, client in again.clients.items():
        note = first.memories[name].entry("member")
        client.member.load_state_(json.loads(bytes(note["json"].tolist())))
    tail = again.run(3, start=after(head[-1]))
    assert torch.equal(tail[-1].params, whole[-1].params)
    assert tail[0].set_up == Traffic()


def test_the_keys_of_a_run_are_counted_beside_its_rounds():
    secure, plain = SecureFederation().run(2), SecureFederation(secure=False).run(2)
    assert [one.set_up for one in plain] == [Traffic(), Traffic()]
    assert secure[0].set_up.up > 6 * (32 + 64)  # at least a key and its signature from each
    assert secure[0].set_up.down > 6 * 6 * (32 + 64)  # and everybody's to each
    assert secure[1].set_up == Traffic()
    assert secure[0].bytes_down == pytest.approx(secure[1].bytes_down, rel=0.02)


def test_a_client_answers_one_question_a_round():
    federation = SecureFederation()
    federation.run(1)
    client = federation.clients["c0"]
    other = Message(
        "fit",
        {"round": 1, "agreement": federation.agreement, "cohort": NAMES},
        {"params": federation.params + 1},
    )
    with pytest.raises(Exception, match="round 1"):
        client.handle(pack(other))


@pytest.mark.parametrize(
    ("chain", "cure"),
    [
        (
            (TopK(), Clip(clip_norm=1.0), Discretize(scale=1.0)),
            "cannot decode a sum of 'topk'; use 'randomk'",
        ),
        ((Quantize(bits=8),), "cannot decode a sum of 'quantize'"),
        ((Clip(clip_norm=1.0),), "end the list with"),
        ((Discretize(scale=1.0),), "put 'clip' before it"),
    ],
)
def test_a_list_whose_sum_cannot_be_decoded_is_refused_before_the_run(chain, cure):
    with pytest.raises(RecipeError, match=cure):
        SecureFederation(chain=chain)


def test_a_random_part_of_the_values_sums_securely():
    chain = (Clip(clip_norm=1.0), RandomK(density=0.5), Discretize(scale=200.0))
    size = len(SecureFederation().params)
    federation = SecureFederation(secure=False, chain=chain)
    assert federation.uplink.vector_codecs[0].chain[-1].size == math.ceil(size / 2)


def test_example_weights_are_refused_under_a_secure_sum():
    aggregator = SecureSum(SecurePlan(cohort=6, bits=16), 3, 100, ())
    with pytest.raises(RecipeError, match='set weights = "equal"'):
        Uplink.bind(
            Payload(3, chain=CHAIN), Cohort(6, 6), aggregator=aggregator, weights="examples"
        )
