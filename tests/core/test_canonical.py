import functools
import math
from dataclasses import dataclass

import pytest
import torch

from fedpress.codecs import Clip
from fedpress.core.canonical import canonical
from fedpress.federation import LocalSettings


def test_a_renamed_class_gives_the_same_agreement():
    @dataclass(frozen=True)
    class Before:
        kind: str
        size: float

    @dataclass(frozen=True)
    class After:
        kind: str
        size: float

    assert canonical(Before("row", math.inf)) == canonical(After("row", math.inf))
    assert canonical(Clip(clip_norm=2.0)) == {"kind": "clip", "clip_norm": 2.0}
    assert "mlp" not in str(canonical(LocalSettings()))


def test_what_has_no_canonical_form_is_an_error_of_the_program():
    with pytest.raises(TypeError, match="Tensor has no canonical JSON"):
        canonical(torch.zeros(1))


class One:
    def work(self):
        """Does nothing."""


class Two(One):
    def work(self):
        """Does something else."""


def test_functions_of_one_name_in_two_classes_are_two():
    assert canonical(One().work) != canonical(Two().work)
    assert canonical(math.sqrt) == "sqrt"


@pytest.mark.parametrize(
    "value", [lambda x: x, functools.partial(pow, 2), torch.nn.ReLU(), {1: "a", "1": "b"}]
)
def test_what_could_be_taken_for_something_else_has_no_canonical_form(value):
    with pytest.raises(TypeError, match=r"name|no canonical JSON|have the same text"):
        canonical(value)
