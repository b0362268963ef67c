import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.errors import ModelError
from fedpress.models import ModelSpec, freeze_batch_norm_
from fedpress.models.norms import WSConv2d, conv, norm_layer


def group_normed(x, groups, eps=1e-5):
    """Group normalisation by its definition, one sample and group at a time."""
    out = torch.empty_like(x)
    size = x.shape[1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, g * size : (g + 1) * size]
            out[n, g * size : (g + 1) * size] = (part - part.mean()) / (
                part.var(unbiased=False) + eps
            ).sqrt()
    return out


def test_standardised_filters_have_mean_zero_and_variance_one():
    layer = conv(5, 7, 3, stride=2, norm="group")
    x = torch.randn(2, 5, 8, 8)
    filters = [(f - f.mean()) / (f.var(unbiased=False) + 1e-5).sqrt() for f in layer.weight]
    assert isinstance(layer, WSConv2d)
    torch.testing.assert_close(layer(x), F.conv2d(x, torch.stack(filters), stride=2, padding=1))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (48, 24), (33, 11), (7, 7), (1, 1), (37, 1), (20, 20), (40, 20)],
)
def test_group_norm_has_at_most_32_groups_that_divide_the_channels(channels, groups):
    layer = norm_layer(channels, "group")
    assert layer.num_groups == groups
    x = torch.randn(2, channels, 3, 3)
    torch.testing.assert_close(layer(x), group_normed(x, groups), atol=1e-5, rtol=1e-5)


def test_under_group_norm_no_sample_influences_another():
    torch.manual_seed(0)
    model = ModelSpec(
        architecture="resnet-small", arguments={"norm": "group", "width": 8}, input_shape=(3, 8, 8)
    ).build()
    x = torch.randn(4, 3, 8, 8)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert not any(type(m) is nn.Conv2d for m in model.modules())


def test_batch_norm_comes_with_plain_convolutions():
    assert type(conv(3, 4, 3)) is nn.Conv2d
    assert type(norm_layer(4, "batch")) is nn.BatchNorm2d
    assert conv(3, 4, 3).bias is None


@pytest.mark.parametrize("word", ["grup", "frozen", None])
def test_another_word_for_a_norm_is_refused(word):
    spec = ModelSpec(architecture="resnet18", arguments={"norm": word}, input_shape=(3, 32, 32))
    with pytest.raises(ModelError, match=r"^spec.arguments.norm: got .*; use 'batch' or 'group'$"):
        spec.build()


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    assert freeze_batch_norm_(model.train()) is model
    before = {name: b.clone() for name, b in model[1].named_buffers()}
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    model(x).sum().backward()
    assert all(torch.equal(b, before[name]) for name, b in model[1].named_buffers())
    assert model[1].weight.grad is not None
    assert [m.training for m in (model, model[0], model[1], model[2])] == [True, True, False, True]
    quiet = nn.Sequential(model[0], model[1])
    torch.testing.assert_close(quiet(x)[:1], quiet(x[:1]))  # no sample influences another
    model.train()
    assert model[1].training
