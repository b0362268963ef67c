from dataclasses import dataclass, field, replace

import pytest
import torch

from fedpress.codecs import Bound, Clip, Encoded, Transform, bind_chain, decode_chain, encode_chain
from fedpress.errors import RecipeError, WireError
from tests.federation.federation import key


@dataclass(frozen=True)
class Halve:
    """A transform with a side tensor and another size, as compression has: keeps half, sends the mean of the rest."""

    size: int = 0
    additive: bool = field(default=True, init=False)

    def bind(self, bound):
        if bound.size % 2:
            raise RecipeError("the size is odd", place="size", cure="halve another")
        return replace(self, size=bound.size), replace(bound, size=bound.size // 2)

    def encode(self, x, key):
        return Encoded(x[: self.size // 2], {"rest": x[self.size // 2 :].mean()})

    def decode(self, x, key):
        if "rest" not in x.side:
            raise WireError("is missing", place="halve.rest", cure="send it")
        return torch.cat([x.values, x.side["rest"].expand(self.size // 2)])


def test_a_chain_binds_each_transform_to_the_bound_before_it():
    chain, end = bind_chain([Clip(clip_norm=2.0), Halve(), Halve()], Bound(8))
    assert [t.size for t in chain[1:]] == [8, 4]
    assert end == Bound(2, l2=2.0, linf=2.0, decoded_l2=2.0)


def test_a_transform_that_does_not_fit_is_refused_when_bound():
    with pytest.raises(RecipeError, match=r"^chain\[1\]\.size: .* halve another"):
        bind_chain([Halve(), Halve()], Bound(6))


def test_decoding_undoes_a_chain_with_side_tensors():
    chain, _ = bind_chain([Halve(), Halve()], Bound(8))
    x = torch.tensor([1.0, 2.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0])
    tensors = encode_chain(chain, x, key())
    assert sorted(tensors) == ["0.rest", "1.rest", "values"]
    assert torch.equal(decode_chain(chain, tensors, key()), x)


def test_missing_and_unknown_tensors_are_wire_errors():
    chain, _ = bind_chain([Halve()], Bound(4))
    tensors = encode_chain(chain, torch.ones(4), key())
    for bad, message in [
        ({"0.rest": tensors["0.rest"]}, "'values' is missing"),
        ({"values": tensors["values"]}, r"halve\.rest"),
        (tensors | {"1.rest": torch.ones(1)}, r"message\.tensors\.1\.rest: no transform"),
        (tensors | {"extra": torch.ones(1)}, r"message\.tensors\.extra: no transform"),
    ]:
        with pytest.raises(WireError, match=message):
            decode_chain(chain, bad, key())


def test_clip_promises_what_it_does():
    clip: Transform
    clip, bound = Clip(clip_norm=0.5).bind(Bound(3))
    x = clip.encode(torch.tensor([3.0, 0.0, 4.0]), key()).values
    assert float(x.double().norm()) <= bound.l2 == 0.5
    assert torch.allclose(x, torch.tensor([0.3, 0.0, 0.4]))


def test_keys_give_clients_own_and_shared_streams():
    def draw(chance):
        return chance.uniform(3).tolist()

    assert draw(key("a").client_stream("x")) == draw(key("a").client_stream("x"))
    assert draw(key("a").round_stream("x")) == draw(key("b").round_stream("x"))
    streams = [
        key("a").client_stream("x"),
        key("b").client_stream("x"),
        key("a", 2).client_stream("x"),
        key("a").client_stream("y"),
        key("a").round_stream("x"),
    ]
    assert len({tuple(draw(s)) for s in streams}) == len(streams)
