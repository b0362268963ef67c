import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpress.nn.forward_sizes import (
    SIZED,
    numbers_in,
    numbers_of,
    record_numbers_,
    set_numbers_,
    with_numbers,
)

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


@pytest.mark.parametrize(
    ("function", "args", "options", "numbers"), CALLS, ids=lambda v: getattr(v, "__name__", "")
)
def test_the_numbers_of_a_call_come_in_the_order_of_its_signature_and_can_be_replaced(
    function, args, options, numbers
):
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


def places(model, *inputs):
    """Returns the places of the calls of a model by the last word, the operation, and the numbers that they pass."""
    twin = copy.deepcopy(model)
    seen = record_numbers_(twin, [name for name, _ in model.named_modules()])
    with suppress(RuntimeError):  # of sizes that are to be put right
        twin(*(inputs or (X,)))
    return seen


def test_only_calls_of_the_named_module_are_put_right_by_their_place():
    model = Outer()
    seen = places(model)
    assert list(seen[""].values()) == [[4, 8, 1], [0, 0], [0, 8], [None, None, None, None, 6, None]]
    assert list(seen["inner"].values()) == [[2, 3, 4]]
    split, _, pad, cut = seen[""]
    assert split.startswith("test_forward_sizes.py:Outer.forward+1:")
    assert split.endswith(" split#0")
    (view,) = seen["inner"]
    set_numbers_(
        model, {"": {split: {0: 5, 1: 7}, pad: {1: 7}, cut: {4: -2}}, "inner": {view: {1: 2, 2: 6}}}
    )
    expected = X.clone()
    expected[:, 5:] = 0
    assert torch.equal(model(X), expected[:, :10])


def test_files_that_name_the_index_of_a_call_still_open():
    model = Outer()
    set_numbers_(
        model, {"": {0: {0: 5, 1: 7}, "2": {1: 7}, 3: {4: -2}}, "inner": {0: {1: 2, 2: 6}}}
    )
    expected = X.clone()
    expected[:, 5:] = 0
    assert torch.equal(model(X), expected[:, :10])
    seen = places(Outer())
    cut = next(
        call for call in seen[""] if call.endswith("__getitem__#0") and seen[""][call][-2] == 6
    )
    set_numbers_(model, {"": {cut: {4: (1, 2)}}})  # by the index and then by the place: half of -2
    assert model(X).shape == (2, 11)


class Paths(nn.Module):
    """Takes a detour with a number on one of its two ways, and loops as often as it is told."""

    def forward(self, x, detour, times=2):
        if detour:
            x = x.view(2, 3, 4).flatten(1)
        parts = [x.view(2, part, -1) for part in (2, 3)]
        for _ in range(times):
            x = self.halves(x)
        return x, parts

    def halves(self, x):
        return x.view(2, 2, 6).flatten(1)


def test_a_place_is_the_same_whichever_way_leads_there():
    model, other = Paths(), Paths()
    long, short = places(model, X, True)[""], places(model, X, False)[""]
    assert [row for call, row in long.items() if call not in short] == [[2, 3, 4]]
    assert {call: row for call, row in long.items() if call in short} == short
    first, second = (call for call, row in short.items() if row[-1] == -1)
    assert first.removesuffix("#0") == second.removesuffix("#1")
    set_numbers_(other, {"": {first: {1: 4}, second: {1: 6}}})
    for detour in (True, False):
        assert [part.shape for part in other(X, detour)[1]] == [(2, 4, 3), (2, 6, 2)]


def test_a_place_without_a_turn_is_right_however_often_a_loop_reaches_it():
    model = Paths()
    loop = next(call for call in places(model, X, False)[""] if "halves" in call)
    assert "Paths.forward" in loop  # the way to the helper is a part of the place
    set_numbers_(model, {"": {loop.removesuffix("#0"): {1: (3, 2), 2: (2, 3)}}})
    for times in (1, 5):
        assert torch.equal(model(X, False, times)[0], X)
    set_numbers_(model, {"": {loop: {1: (4, 3), 2: (3, 4)}}})  # and the first call further
    assert numbers_in(model)[""][loop] == {1: (12, 6), 2: (6, 12)}


def test_corrections_travel_with_copies_add_up_and_end_with_each_call_even_a_failing_one():
    model = Outer()
    seen = places(model)
    cut, view = list(seen[""])[3], next(iter(seen["inner"])).partition("#")[0]
    set_numbers_(model, {"": {cut: {4: 5}}, "inner": {view: {0: (2, 1)}}})
    set_numbers_(model, {"": {cut: {4: 4}}, "inner": {view: {0: (1, 2)}}})
    twin = copy.deepcopy(model)
    assert numbers_in(twin) == {"": {cut: {4: 4}}, "inner": {view: {0: (2, 2)}}}
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
    (view,) = places(model, x)[""]
    set_numbers_(model, {"": {view: {1: 2}}})
    weights = dict(model.named_parameters())

    def loss(weights, one):
        return torch.func.functional_call(model, weights, (one[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    (whole,) = torch.autograd.grad(model(x).square().sum(), [weights["a.weight"]])
    torch.testing.assert_close(grads["a.weight"].sum(0), whole)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False
    )
    assert torch.equal(program.module()(x[:3]), model(x[:3]))


def test_every_sized_function_takes_a_torch_function_mode():
    assert all(callable(function) for function in SIZED)
    with pytest.raises(AttributeError):
        set_numbers_(Outer(), {"other": {}})
