import gc

import pytest
import torch

from fedpress.errors import RunError
from fedpress.transport.processes.slots import Slots
from fedpress.wire.message import DTYPES


def tensors():
    found = {}
    for at, (name, dtype) in enumerate(DTYPES.items()):
        found[name] = torch.arange(at, at + 7).to(dtype).reshape(7, 1)
    return found | {"empty": torch.zeros(0, 3), "number": torch.tensor(2.5)}


@pytest.mark.parametrize("size", [1, 100, 300, 5000])
def test_tensors_of_all_types_come_back_whether_they_fit_or_not(size):
    slots = Slots(1, size)
    sent = (tensors(), {}, {"x": torch.ones(40).bfloat16()})
    for slot in (slots.take(), None):
        received = slots.read(slot, *slots.write(slot, *sent))
        assert len(received) == 3
        for group, other in zip(sent, received, strict=True):
            assert list(group) == list(other)
            for name, tensor in group.items():
                assert other[name].dtype == tensor.dtype
                assert torch.equal(other[name], tensor)


def test_views_and_gradients_are_sent_as_values():
    slots = Slots(1, 1000)
    whole = torch.arange(12.0, requires_grad=True)
    slot = slots.take()
    pieces = slots.write(slot, {"t": whole.reshape(3, 4).t(), "part": whole[::2]})
    (found,) = slots.read(slot, *pieces)
    assert found["t"].tolist() == whole.reshape(3, 4).t().tolist()
    assert found["part"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_a_slot_is_free_only_when_no_view_is_left():
    slots = Slots(2, 1000)
    slot = slots.take()
    pieces = slots.write(slot, {"a": torch.arange(9.0), "b": torch.ones(2)})
    (found,) = slots.read(slot, *pieces, give=True)
    kept = found["a"][2:5]
    del found
    gc.collect()
    assert slots.num_free == 1
    assert kept.tolist() == [2.0, 3.0, 4.0]
    del kept
    gc.collect()
    assert slots.num_free == 2


def test_no_slot_is_given_twice():
    slots = Slots(3, 10)
    assert sorted(slots.take() for _ in range(3)) == [0, 1, 2]
    assert slots.take() is None
    slots.give(1)
    assert slots.take() == 1


def test_too_little_memory_is_told_with_a_way_round():
    with pytest.raises(RunError, match=r"engine: the system gives no .* shared memory .* engine="):
        Slots(1 << 20, 1 << 45)
