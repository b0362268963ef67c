"""A spec of several inputs: what it makes, and what of a file is refused."""

import json

import pytest
import torch
from pydantic import ValidationError

from fedpress.core.inputs import NamedInputs
from fedpress.core.random_source import public_stream
from fedpress.errors import ModelError
from fedpress.models import ModelSpec

SHAPES = {"tokens": (6,), "lengths": (), "mask": (6,), "sensors": (2, 3)}
DTYPES = {"tokens": "int64", "lengths": "int64", "mask": "bool", "sensors": "float32"}
SPEC = {"architecture": "mlp", "input_shape": SHAPES, "input_dtype": DTYPES}


def test_examples_have_the_shapes_and_types_and_whole_numbers_that_mean_something():
    spec = ModelSpec(**SPEC)
    for x in (spec.example(3), spec.example(3, public_stream(0, "noise"))):
        assert isinstance(x, NamedInputs)
        assert {name: tuple(x[name].shape) for name in x} == {n: (3, *s) for n, s in SHAPES.items()}
        assert {name: str(x[name].dtype).split(".")[1] for name in x} == DTYPES
        # A length of 0 or a mask of nothing would divide by 0.
        assert all(bool((x[name] == 1).all()) for name in ("tokens", "lengths", "mask"))
    assert bool((x["sensors"] != 0).any())


def test_a_file_brings_the_same_spec():
    spec = ModelSpec(**SPEC)
    assert ModelSpec.of_file(spec.model_dump_json()) == spec
    one = ModelSpec(architecture="mlp", input_shape=(4,))
    assert json.loads(one.model_dump_json())["input_shape"] == [4]
    assert torch.equal(ModelSpec.of_file(one.model_dump_json()).example(2), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_dtype": "float32"}, ValidationError, "must name the same inputs"),
        ({"input_shape": (3,)}, ValidationError, "must name the same inputs"),
        ({"input_shape": {}, "input_dtype": {}}, ValidationError, "must name the same inputs"),
        ({"input_dtype": {**DTYPES, "mask": "float64"}}, ValidationError, "bool"),
        ({"input_shape": {**SHAPES, "tokens": (0,)}}, ModelError, "expected sizes above 0"),
        ({"input_shape": {**SHAPES, "tokens": (2**31,)}}, ModelError, "the limit is"),
        ({"input_shape": {**SHAPES, "tokens": (2**20, 2**9)}}, ModelError, "FEDPRESS_MAX_INPUT"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(changes, error, message):
    text = json.dumps({**SPEC, **changes})
    with pytest.raises(error, match=message):
        ModelSpec.of_file(text)
