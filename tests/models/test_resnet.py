import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.models.resnet import BasicBlock, resnet18, resnet_small


def test_resnet18_has_its_parameters_and_sees_small_images_whole():
    model = resnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert (
        len([m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)])
        == 17
    )
    with torch.inference_mode():
        features = model.stages(F.relu(model.norm(model.stem(torch.zeros(1, 3, 32, 32)))))
    assert features.shape == (1, 512, 4, 4)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 5, 7), (1, 1, 1)])
def test_small_networks_take_images_of_any_size(norm, shape):
    model = resnet_small(num_classes=4, in_channels=shape[0], width=4, norm=norm).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


def test_the_width_of_a_small_network_doubles_twice():
    widths = [stage[0].conv2.out_channels for stage in resnet_small(width=6).stages]
    assert widths == [6, 12, 24]


@pytest.mark.parametrize(("i", "o", "stride"), [(4, 4, 1), (4, 8, 1), (4, 8, 2), (4, 4, 2)])
def test_a_block_adds_its_shortcut(i, o, stride):
    torch.manual_seed(0)
    block, x = BasicBlock(i, o, stride=stride, norm="batch").eval(), torch.randn(2, i, 6, 6)
    inner = F.conv2d(x, block.conv1.weight, stride=stride, padding=1) / (1 + 1e-5) ** 0.5
    inner = F.conv2d(inner.clamp_min(0), block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
    short = x
    if (i, stride) != (o, 1):
        short = F.conv2d(x, block.shortcut[0].weight, stride=stride) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), (inner + short).clamp_min(0))
