"""Sums in blocks: the same bits wherever the blocks are added up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpress.codecs import Bound, Key
from fedpress.federation.aggregators.base import Contribution
from fedpress.federation.aggregators.mean import BLOCKS, RunningSum, block_size
from fedpress.federation.vector_codec import VectorCodec

CODECS = [
    VectorCodec("update", Bound(7), (), (), Bound(7)),
    VectorCodec("control", Bound(3), (), (), Bound(3)),
]


def contributions(count, left_out, seed=0):
    chance = torch.Generator().manual_seed(seed)
    made = []
    for position in range(count):
        vectors = {
            codec.name: torch.randn(codec.size, generator=chance) * 10.0 ** (position % 9)
            for codec in CODECS
        }
        weight = float(torch.randint(1, 99, (), generator=chance))
        if position not in left_out:
            made.append(Contribution(Key(0, 1, f"c{position}"), weight, vectors, position=position))
    return made


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    per_block=st.integers(1, 9),
    left_out=st.sets(st.integers(0, 39)),
    data=st.data(),
)
def test_parts_of_blocks_give_the_bits_of_one_sum(count, per_block, left_out, data):
    made = contributions(count, left_out)
    whole = RunningSum.of(CODECS, per_block)
    for one in made:
        whole.add(one)
    joined = RunningSum.of(CODECS, per_block)
    for first in range(0, count, per_block):
        block = [one for one in made if first <= one.position < first + per_block]
        # A block may be merged as a whole, or one client after another.
        size = min(per_block, count - first)
        whole_block = data.draw(st.booleans())
        groups = [(first, size, block)] if whole_block else [(o.position, 1, [o]) for o in block]
        for position, clients, group in groups:
            part = RunningSum.of(CODECS, None)
            for one in group:
                part.add(one)
            joined.merge(part.close(), position, clients)
    expected, found = whole.close(), joined.close()
    assert expected.weight == found.weight == sum(one.weight for one in made)
    for codec in CODECS:
        assert torch.equal(expected.vectors[codec.name], found.vectors[codec.name])
        plain = sum(
            (one.weight * one.vectors[codec.name].double() for one in made),
            torch.zeros(codec.size).double(),
        )
        assert torch.allclose(found.vectors[codec.name], plain, rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("cohort", [1, 2, 31, 32, 33, 64, 65, 1000, 12345])
def test_a_cohort_has_at_most_so_many_blocks_and_no_block_is_needlessly_large(cohort):
    size = block_size(cohort)
    assert -(-cohort // size) <= BLOCKS
    assert size == 1 or -(-cohort // (size - 1)) > BLOCKS
