import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpress.calls import SIZED, numbers_in, numbers_of, set_numbers_, watch_, with_numbers

X = torch.arange(24.0).view(2, 12)
INDEX = (slice(None), slice(4, None), None, ..., slice(0, 8, 2), 3)
CALLS = [
    (Tensor.view, (X, 2, 3, 4), {}, [2, 3, 4]),
    (Tensor.view, (X, (2, -1)), {}, [2, -1]),
    (Tensor.reshape, (X,), {"shape": (4, 6)}, [4, 6]),
    (Tensor.unflatten, (X,), {"sizes": (3, 4), "dim": 1}, [1, 3, 4]),
    (torch.split, (X, [4, 8]), {"dim": 1}, [4, 8, 1]),
    (Tensor.narrow, (X,), {"length": 4, "start": 2, "dim": 1}, [1, 2, 4]),
    (F.pad, (X, (1, 2)), {"value": 0.5}, [1, 2]),
    (torch.zeros, (3, 4), {"requires_grad": True}, [3, 4]),
    (Tensor.__getitem__, (X, INDEX), {}, [None, None, None, 4, None, None, 0, 8, 2, 3]),
]


@pytest.mark.parametrize(("function", "args", "options", "numbers"), CALLS, ids=lambda v: getattr(v, "__name__", ""))
def test_the_numbers_of_a_call_come_in_the_order_of_its_signature_and_can_be_replaced(function, args, options, numbers):
    assert numbers_of(function, args, options) == numbers
    right = {i: n + 1 for i, n in enumerate(numbers) if n not in (None, -1)}
    changed = numbers_of(function, *with_numbers(function, args, options, right))
    assert changed == [n if n in (None, -1) else n + 1 for n in numbers]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 64))
def test_a_multiple_stays_a_multiple_for_any_batch(batch, old, new):
    args, _ = with_numbers(Tensor.reshape, (X, batch * old, 7), {}, {0: (new, old)})
    assert args[1:] == (batch * new, 7)


class Inner(nn.Module):
    def forward(self, x):
        return x.view(2, 3, 4).flatten(1)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        first, _ = self.inner(x).split([4, 8], 1)
        if x[0, 0] < 0:
            raise ValueError("no")
        return self.inner(F.pad(first, (0, 8)))[:, :6]


def test_only_calls_of_the_named_module_are_counted_and_put_right():
    model = Outer()
    seen = watch_(model, ["", "inner"])
    model(X)
    assert seen == {
        "": {0: [4, 8, 1], 1: [0, 0], 2: [0, 8], 3: [None, None, None, None, 6, None]},
        "inner": {0: [2, 3, 4]},
    }
    set_numbers_(model, {"": {0: {0: 5, 1: 7}, 2: {1: 7}, 3: {4: -2}}, "inner": {0: {1: 2, 2: 6}}})
    expected = X.clone()
    expected[:, 5:] = 0
    assert torch.equal(model(X), expected[:, :10])


def test_corrections_travel_with_copies_add_up_and_end_with_each_call_even_a_failing_one():
    model = Outer()
    set_numbers_(model, {"": {3: {4: 5}}, "inner": {0: {0: (2, 1)}}})
    set_numbers_(model, {"": {3: {4: 4}}, "inner": {0: {0: (1, 2)}}})
    twin = copy.deepcopy(model)
    assert numbers_in(twin) == {"": {3: {4: 4}}, "inner": {0: {0: (2, 2)}}}
    assert twin(X).shape == model(X).shape == (2, 4)
    with pytest.raises(ValueError, match="no"):
        twin(-X - 1)
    assert twin(X).shape == (2, 4)
    assert X[:, :6].shape == (2, 6)
    assert torch.overrides._get_current_function_mode() is None


def test_corrections_hold_under_gradients_per_sample_and_export_with_a_free_batch():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 8)

        def forward(self, x):
            return self.a(x).view(x.shape[0], 4, 4).sum(1)

    model, x = Heads(), torch.randn(5, 3)
    set_numbers_(model, {"": {0: {1: 2}}})
    weights = dict(model.named_parameters())

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    (whole,) = torch.autograd.grad(model(x).square().sum(), [weights["a.weight"]])
    torch.testing.assert_close(grads["a.weight"].sum(0), whole)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
    assert torch.equal(program.module()(x[:3]), model(x[:3]))


def test_every_sized_function_takes_a_torch_function_mode():
    assert all(callable(function) for function in SIZED)
    with pytest.raises(AttributeError):
        set_numbers_(Outer(), {"other": {}})
