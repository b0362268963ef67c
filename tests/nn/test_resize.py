from copy import deepcopy

import pytest
import torch
from torch import nn

from fedpress.nn.resize import NarrowAttention, get_tensor, replace_tensors_


def cut(model, *names, keep, axis=0):
    """Keeps the first `keep` entries along `axis` of the named tensors."""
    new = {}
    for name in names:
        old = get_tensor(model, name)
        part = old.detach().narrow(axis, 0, keep).clone()
        new[name] = nn.Parameter(part) if isinstance(old, nn.Parameter) else part
    replace_tensors_(model, new)
    return model


LAYERS = [
    (nn.Conv2d(6, 8, 3), ("weight", "bias"), 0, 5, nn.Conv2d(6, 5, 3), (2, 6, 4, 4)),
    (nn.Conv2d(6, 8, 3), ("weight",), 1, 4, nn.Conv2d(4, 8, 3), (2, 4, 4, 4)),
    (nn.Conv2d(6, 8, 3, groups=2), ("weight",), 1, 2, nn.Conv2d(4, 8, 3, groups=2), (2, 4, 4, 4)),
    (
        nn.Conv2d(6, 8, 3, groups=2),
        ("weight", "bias"),
        0,
        4,
        nn.Conv2d(6, 4, 3, groups=2),
        (2, 6, 4, 4),
    ),
    (
        nn.Conv2d(8, 8, 3, groups=8),
        ("weight", "bias"),
        0,
        5,
        nn.Conv2d(5, 5, 3, groups=5),
        (2, 5, 4, 4),
    ),
    (
        nn.Conv2d(8, 16, 3, groups=8),
        ("weight", "bias"),
        0,
        6,
        nn.Conv2d(3, 6, 3, groups=3),
        (2, 3, 4, 4),
    ),
    (nn.Conv1d(6, 8, 3), ("weight", "bias"), 0, 5, nn.Conv1d(6, 5, 3), (2, 6, 4)),
    (nn.ConvTranspose2d(6, 8, 3), ("weight",), 0, 4, nn.ConvTranspose2d(4, 8, 3), (2, 4, 4, 4)),
    (
        nn.ConvTranspose2d(6, 8, 3, bias=False),
        ("weight",),
        1,
        5,
        nn.ConvTranspose2d(6, 5, 3, bias=False),
        (2, 6, 4, 4),
    ),
    (
        nn.ConvTranspose1d(6, 2, 3, groups=2),
        ("weight",),
        0,
        4,
        nn.ConvTranspose1d(4, 2, 3, groups=2),
        (2, 4, 5),
    ),
    (
        nn.ConvTranspose1d(6, 6, 3, groups=6),
        ("weight", "bias"),
        0,
        4,
        nn.ConvTranspose1d(4, 4, 3, groups=4),
        (2, 4, 5),
    ),
    (nn.Linear(6, 8), ("weight", "bias"), 0, 5, nn.Linear(6, 5), (2, 6)),
    (nn.Linear(6, 8), ("weight",), 1, 5, nn.Linear(5, 8), (2, 5)),
    (
        nn.BatchNorm2d(8),
        ("weight", "bias", "running_mean", "running_var"),
        0,
        5,
        nn.BatchNorm2d(5),
        (2, 5, 3, 3),
    ),
    (
        nn.BatchNorm2d(8, affine=False),
        ("running_mean", "running_var"),
        0,
        5,
        nn.BatchNorm2d(5, affine=False),
        (2, 5, 3, 3),
    ),
    (nn.GroupNorm(4, 8), ("weight", "bias"), 0, 6, nn.GroupNorm(3, 6), (2, 6, 3, 3)),
    (nn.PReLU(8), ("weight",), 0, 5, nn.PReLU(5), (2, 5, 3)),
]


@pytest.mark.parametrize(
    ("layer", "names", "axis", "keep", "expected", "shape"), LAYERS, ids=lambda v: str(v)[:40]
)
def test_a_smaller_layer_is_the_one_that_would_have_been_made(
    layer, names, axis, keep, expected, shape
):
    small = cut(layer, *names, keep=keep, axis=axis)
    assert repr(small) == repr(expected)
    expected.load_state_dict(small.state_dict())
    x = torch.randn(shape)
    assert torch.equal(small.eval()(x), expected.eval()(x))


def test_a_shared_tensor_stays_shared_wherever_it_is_named_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    cut(model, "0.weight", keep=3)
    assert model[0].weight is model[2].weight
    assert [model[0].out_features, model[2].out_features] == [3, 3]


def test_layers_that_are_not_named_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[1].weight
    cut(model, "0.weight", "0.bias", keep=2)
    assert model[1].weight is kept
    assert model[1].out_features == 4


@pytest.mark.parametrize(
    "name", ["", "weight", "0", "0.weigth", "1.weight", "0.in_features", "0.bias"]
)
def test_only_tensors_have_names(name):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(AttributeError):
        get_tensor(model, name)
    with pytest.raises(AttributeError):
        replace_tensors_(model, {name: torch.zeros(1)})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_loses_hidden_units_and_inputs(kind):
    old, new = kind(6, 8, 2, bidirectional=True), kind(5, 4, 2, bidirectional=True)
    replace_tensors_(
        old, {n: nn.Parameter(torch.randn(p.shape)) for n, p in new.named_parameters()}
    )
    new.load_state_dict(old.state_dict())
    x = torch.randn(3, 2, 5)
    assert repr(old) == repr(new)
    assert torch.equal(old(x)[0], new(x)[0])


def test_a_cell_and_a_table_know_their_sizes():
    cell, words = nn.LSTMCell(3, 8), nn.Embedding(9, 8)
    replace_tensors_(
        cell,
        {n: nn.Parameter(torch.randn(p.shape)) for n, p in nn.LSTMCell(3, 5).named_parameters()},
    )
    cut(words, "weight", keep=5, axis=1)
    assert repr(cell) == repr(nn.LSTMCell(3, 5))
    assert cell(torch.randn(2, 3))[0].shape == (2, 5)
    assert repr(words) == repr(nn.Embedding(9, 5))


def test_a_layer_with_normed_weights_knows_its_sizes():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3, groups=6, bias=False))
    cut(layer, "parametrizations.weight.original0", "parametrizations.weight.original1", keep=4)
    assert (layer.groups, layer.in_channels, layer.out_channels) == (4, 4, 4)
    assert layer(torch.randn(2, 4, 5)).shape == (2, 4, 3)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 5, "vdim": 7}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
)
@pytest.mark.parametrize("masked", [True, False])
def test_narrow_attention_equals_torchs_own(options, batch_first, masked):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    ours = deepcopy(theirs)
    ours.__class__ = NarrowAttention
    q, k, v = (
        torch.randn(3, n, w)
        for n, w in ((4, 8), (6, options.get("kdim", 8)), (6, options.get("vdim", 8)))
    )
    masks = (
        {"key_padding_mask": torch.rand(3, 6) < 0.3, "attn_mask": torch.randn(4, 6)}
        if masked
        else {}
    )
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for how in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        for a, b in zip(
            theirs(q, k, v, **masks, **how), ours(q, k, v, **masks, **how), strict=True
        ):
            torch.testing.assert_close(a, b, equal_nan=True)
    if masked:
        masks["attn_mask"] = torch.rand(6, 4, 6) < 0.2
        torch.testing.assert_close(
            theirs(q, k, v, **masks)[0], ours(q, k, v, **masks)[0], equal_nan=True
        )
    elif not options:
        torch.testing.assert_close(theirs(q[0], q[0], q[0])[0], ours(q[0], q[0], q[0])[0])


def test_an_encoder_of_narrow_attention_takes_no_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    names = [f"layers.{i}.self_attn" for i in range(2)]
    rows = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19])  # the first of two heads
    masked, new = deepcopy(model), {}
    for name in names:
        attention, twin = model.get_submodule(name), masked.get_submodule(name)
        new[f"{name}.in_proj_weight"] = nn.Parameter(attention.in_proj_weight.data[rows])
        new[f"{name}.in_proj_bias"] = nn.Parameter(attention.in_proj_bias.data[rows])
        new[f"{name}.out_proj.weight"] = nn.Parameter(attention.out_proj.weight.data[:, :4])
        twin.out_proj.weight.data[:, 4:] = 0
    replace_tensors_(model, new)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))
        seen = ~padding
        expected = masked(x, src_key_padding_mask=padding)[seen]
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[seen], expected)
