"""A model's tensors come back from their vectors with the same bits; wrong entries are refused."""

import pytest
import torch

from fedpress.errors import WireError
from fedpress.stages.federate.flat_model import Entry, join, split
from fedpress.wire.message import Message, pack, unpack

TENSORS = {
    "weight": torch.tensor([[1.0, -0.0], [float("nan"), float("inf")]]),
    "half": torch.tensor([0.5, -3.0], dtype=torch.bfloat16),
    "steps": torch.tensor(3),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 5),
    "codes": torch.tensor([[200, 1]], dtype=torch.uint8),
    "bias": torch.arange(3.0),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
}
F32 = {"model.F32": torch.zeros(4)}


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_all_types_and_shapes_come_back_with_the_same_bits_and_in_the_same_order():
    entries, vectors = join(TENSORS)
    found = split(entries, unpack(pack(Message("offer", {}, vectors))).tensors)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        # As bytes, since NaN is not equal to itself.
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor))


def test_there_is_one_vector_for_each_type_and_reading_makes_no_copy():
    entries, vectors = join(TENSORS)
    assert set(vectors) == {"model.F32", "model.BF16", "model.I64", "model.BOOL", "model.U8"}
    weight = split(entries, vectors)["weight"]
    assert weight.untyped_storage().data_ptr() == vectors["model.F32"].untyped_storage().data_ptr()


def test_a_type_that_no_message_has_is_named():
    with pytest.raises(WireError, match=r"model\.w: dtype torch\.complex64"):
        join({"w": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize(
    ("entries", "vectors"),
    [
        ([("a", "F32", (3,))], F32),
        ([("a", "F32", (5,))], F32),
        ([("a", "F32", (2,)), ("a", "F32", (2,))], F32),
        ([("a", "F33", (4,))], F32),
        ([("a", "F32", (4,))], {}),
        ([("a", "F32", (4,))], {"model.F32": torch.zeros(4).double()}),
        ([("a", "F32", (4,))], {"model.F32": torch.zeros(2, 2)}),
        ([("a", "F32", (0, 1 << 30, 1 << 30, 1 << 30)), ("b", "F32", (4,))], F32),
        ([("a", "F32", (4,))], {**F32, "model.I8": torch.zeros(1, dtype=torch.int8)}),
        ([("a", "BOOL", (1,))], {"model.BOOL": torch.zeros(1)}),
    ],
    ids=["left", "short", "twice", "unknown", "none", "type", "matrix", "huge", "extra", "bool"],
)
def test_entries_that_do_not_fit_the_vectors_are_a_wire_error(entries, vectors):
    made = [Entry(name=name, dtype=dtype, shape=shape) for name, dtype, shape in entries]
    with pytest.raises(WireError, match="same fedpress"):
        split(made, vectors)


@pytest.mark.parametrize("shape", [[-1], [1 << 31], [1] * 9, "4", [1.5], None])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="shape"):
        Entry.model_validate({"name": "a", "dtype": "F32", "shape": shape})
