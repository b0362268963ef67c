from itertools import pairwise

import pytest
import torch

from fedpress.models.plain import CNN, MLP


def test_the_cnn_has_the_parameters_of_the_benchmark():
    model = CNN()
    assert sum(p.numel() for p in model.parameters()) == 1_626_442
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_cnn_takes_other_images_and_classes():
    model = CNN(num_classes=3, in_channels=1, image_size=8)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = CNN(image_size=8, dropout=(0.5, 0.5)), torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4, 3)])
def test_the_mlp_is_linear_layers_with_relu_between(hidden):
    model, x = MLP(in_features=12, hidden=hidden, num_classes=2), torch.randn(3, 3, 2, 2)
    sizes = [12, *hidden, 2]
    assert sum(p.numel() for p in model.parameters()) == sum(
        (i + 1) * o for i, o in pairwise(sizes)
    )
    out = x.reshape(3, 12)
    for at in range(len(hidden) + 1):
        out = out @ model.layers[at].weight.T + model.layers[at].bias
        out = out.clamp_min(0) if at < len(hidden) else out
    torch.testing.assert_close(model(x), out)
