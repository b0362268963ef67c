"""Several inputs by name are dealt, batched and called as one tensor is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import (
    NamedInputs,
    call,
    dtype_of,
    inputs_text,
    join,
    positional,
    shape_of,
    shape_text,
    signature_of,
)
from fedpress.core.random import fingerprint
from fedpress.errors import DataError, ModelError


def some(n: int, seed: int = 0) -> NamedInputs:
    """Returns `n` examples of tokens, lengths and floats."""
    chance = torch.Generator().manual_seed(seed)
    return NamedInputs(
        {
            "tokens": torch.randint(9, (n, 5), generator=chance),
            "lengths": torch.randint(1, 6, (n,), generator=chance),
            "sensors": torch.randn(n, 2, 3, generator=chance),
        }
    )


class Adds(nn.Module):
    def forward(self, tokens, lengths, scale=1.0, *, sensors):
        return tokens.sum(1) + lengths + scale * sensors.sum((1, 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 5), st.data())
def test_rows_are_those_of_each_tensor(n, size, data):
    x = some(n)
    index = torch.tensor(
        data.draw(st.lists(st.integers(0, n - 1), max_size=6)) if n else [], dtype=torch.int64
    )
    assert len(x) == n
    for name in x:
        assert torch.equal(x[index][name], x[name][index])
        assert torch.equal(x[1:][name], x[name][1:])
        for parts, plain in (
            (x.split(size), x[name].split(size)),
            (x.tensor_split(size), x[name].tensor_split(size)),
        ):
            assert [part[name].tolist() for part in parts] == [part.tolist() for part in plain]
    assert torch.equal(join([x, x])["tokens"], torch.cat([x["tokens"], x["tokens"]]))


def test_arrays_take_a_dictionary_and_deal_it_as_one_tensor():
    x = some(7)
    data = Arrays(dict(x), torch.arange(7))
    assert isinstance(data.x, NamedInputs)
    assert len(data) == 7
    assert data.take(torch.tensor([6, 2])).x["lengths"].tolist() == x["lengths"][[6, 2]].tolist()
    assert [len(part) for part, _ in data.batches(3)] == [3, 2, 2]
    with pytest.raises(DataError, match="7 examples but 6 labels"):
        Arrays(dict(x), torch.zeros(6))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "there is no input; give at least one tensor"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(2)},
            "different numbers of rows: 3 of 'a', 2 of 'b'; give one row of each",
        ),
        ({"a": torch.tensor(1.0)}, "'a' is a tensor of no dimension"),
        ({"a": [1, 2]}, "'a' is list; give a tensor"),
        ({"two words": torch.zeros(1)}, "'two words' cannot be the name of an argument"),
        ({"lambda": torch.zeros(1)}, "'lambda' cannot be the name"),
        ({3: torch.zeros(1)}, "3 cannot be the name"),
    ],
)
def test_what_is_no_batch_of_inputs_is_refused(tensors, message):
    with pytest.raises(DataError, match=message):
        NamedInputs(tensors)


def test_a_model_is_called_by_name_in_any_order():
    x = some(4)
    other = NamedInputs({name: x[name] for name in reversed(list(x))})
    expected = Adds()(x["tokens"], x["lengths"], sensors=x["sensors"])
    assert torch.equal(call(Adds(), x), expected)
    assert torch.equal(call(Adds(), other), expected)
    assert torch.equal(call(nn.Identity(), torch.ones(2)), torch.ones(2))


def test_names_that_a_model_does_not_take_are_inputs_text():
    x = some(2)
    lacks = NamedInputs({"tokens": x["tokens"], "sensors": x["sensors"]})
    with pytest.raises(ModelError, match="the model also needs 'lengths'; name the inputs as"):
        call(Adds(), lacks)
    extra = NamedInputs({**{name: x[name] for name in x}, "mask": x["lengths"]})
    with pytest.raises(ModelError, match="the model does not take 'mask'"):
        call(Adds(), extra)


def test_an_error_inside_a_model_stays_what_it_is():
    class Broken(nn.Module):
        def forward(self, tokens):
            return tokens + "words"

    with pytest.raises(TypeError, match="str"):
        call(Broken(), NamedInputs({"tokens": torch.zeros(2)}))


def test_positional_needs_the_first_arguments_of_forward():
    class Two(nn.Module):
        def forward(self, a, b, c=None):
            return a + b

    x = NamedInputs({"b": torch.ones(2), "a": torch.zeros(2)})
    assert [t.tolist() for t in positional(Two(), x)] == [[0, 0], [1, 1]]
    with pytest.raises(ModelError, match="forward begins with 'a', the examples have 'b'"):
        positional(Two(), NamedInputs({"b": torch.ones(2)}))
    with pytest.raises(ModelError, match="put these arguments first"):
        positional(Two(), NamedInputs({"a": torch.ones(2), "c": torch.ones(2)}))


def test_it_is_a_pytree_for_torch():
    x = some(3)
    doubled = tree_map(lambda t: 2 * t, x)
    assert isinstance(doubled, NamedInputs)
    assert torch.equal(doubled["lengths"], 2 * x["lengths"])
    rows = torch.func.vmap(lambda one: call(Adds(), one[None])[0])(x)
    assert torch.allclose(rows, call(Adds(), x))


def test_a_fingerprint_sees_every_value_and_name():
    x = some(3)
    seen = fingerprint(x)
    for name in x:
        tensors = {key: x[key].clone() for key in x}
        tensors[name].view(-1)[0] += 1
        assert fingerprint(NamedInputs(tensors)) != seen
        renamed = {key if key != name else "other": x[key] for key in x}
        assert fingerprint(NamedInputs(renamed)) != seen
    assert fingerprint(NamedInputs({name: x[name] for name in reversed(list(x))})) == seen
    # One fingerprint for two different things would let one noise hide both.
    assert fingerprint(x, 1) != fingerprint(*[x[name] for name in x], 1)


def test_preprocessing_keeps_whole_numbers_and_truth_values():
    x = NamedInputs(
        {
            "image": torch.full((2, 1, 2, 2), 255, dtype=torch.uint8),
            "ids": torch.tensor([3, 4]),
            "mask": torch.tensor([True, False]),
            "sensors": torch.tensor([[0.5], [2.0]], dtype=torch.float64),
        }
    )
    out = Preprocess()(x)
    assert out["image"].dtype == torch.float32
    assert out["image"].max() == 1
    assert out["ids"].dtype == torch.int64
    assert out["mask"].dtype == torch.bool
    assert out["sensors"].tolist() == [[0.5], [2.0]]
    assert Preprocess.fit(x) == Preprocess()
    with pytest.raises(DataError, match="leave mean and std out"):
        Preprocess((0.5,), (0.5,))(x)


def test_shapes_and_forms_are_told_by_name():
    x = some(2)
    assert shape_of(x) == {"tokens": (5,), "lengths": (), "sensors": (2, 3)}
    assert shape_text(shape_of(x)) == "tokens [5], lengths [], sensors [2, 3]"
    assert inputs_text(x) == "tokens [5] int64, lengths [] int64, sensors [2, 3] float32"
    assert signature_of(x) == signature_of(some(9, seed=1))
    assert signature_of(x) != signature_of(NamedInputs({"tokens": x["tokens"]}))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64]
)
def test_the_dtype_that_is_told_is_the_one_that_a_network_gets(dtype):
    alone = torch.ones(2, 3, dtype=dtype)
    named = NamedInputs({"x": alone})
    standardise = Preprocess()
    assert dtype_of(alone) == str(standardise(alone).dtype).removeprefix("torch.")
    assert dtype_of(named) == {"x": str(standardise(named)["x"].dtype).removeprefix("torch.")}
