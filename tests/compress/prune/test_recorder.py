"""The recorder of numbers in forward code while a model is captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from fedpress.compress.prune.recorder import Recorder


class Nested(nn.Module):
    """Calls itself once, then reshapes; fails where it is asked to."""

    def forward(self, x: Tensor, *, again: bool = True, fail: bool = False) -> Tensor:
        if again:
            x = self(x, again=False, fail=fail)
        if fail:
            raise ValueError("asked for")
        return x.view(2, 8)


def test_a_model_that_calls_itself_is_recorded_to_its_end():
    model = Nested()
    # An export that failed before, in another test, may have left torch's own modes there.
    before = _get_current_function_mode_stack()
    with Recorder(model) as recorder:
        assert _get_current_function_mode_stack() == before
        model(torch.zeros(16))
        assert _get_current_function_mode_stack() == before
    assert [call.numbers for call in recorder.calls] == [[2, 8], [2, 8]]


def test_nothing_is_recorded_after_a_forward_that_fails():
    model = Nested()
    before = _get_current_function_mode_stack()
    with Recorder(model) as recorder, pytest.raises(ValueError, match="asked for"):
        model(torch.zeros(16), fail=True)
    assert _get_current_function_mode_stack() == before
    model(torch.zeros(16))
    assert not recorder.calls
