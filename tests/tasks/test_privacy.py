"""Every task has a loss for each example alone, so its gradients can be clipped one by one."""

import copy
import math

import pytest
import torch
from torch import nn

from fedpress import tasks
from fedpress.privacy.per_example.gradients import clipped_gradient_sum
from tests.tasks.test_all import made

CLIP = 0.7


def network(outputs: int, positions: tuple[int, ...] = ()) -> nn.Module:
    """Returns a small network with outputs [n, outputs, *positions]."""
    torch.manual_seed(0)
    head = nn.Linear(6, outputs * math.prod(positions))
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), head, nn.Unflatten(1, (outputs, *positions)))


def network_of(task, y) -> nn.Module:
    """Returns a small network whose outputs fit the targets `y`."""
    return network(task.outputs, y.shape[1:] if task.targets == "classes" else ())


def plainly(model, task, x, y):
    """The plain loop: a gradient for each example, scaled to the clip norm, added up."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    for i in range(len(x)):
        model.zero_grad()
        task.loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += gradient * min(1.0, CLIP / float(gradient.norm()))
    return total


@pytest.mark.parametrize("method", ["loop", "vmap", "ghost"])
@pytest.mark.parametrize("kind", tasks.TASKS)
def test_clipped_sums_are_those_of_a_plain_loop_and_no_example_moves_them_further(kind, method):
    task, _, y = made(kind, 9)
    x = 3 * torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    model = network_of(task, y)
    found, raw = clipped_gradient_sum(model, task.loss, x, y, clip_norm=CLIP, method=method)
    torch.testing.assert_close(
        found, plainly(copy.deepcopy(model), task, x, y), rtol=1e-4, atol=1e-5
    )
    assert raw.share_clipped > 0, "some gradient is longer than the clip norm"
    for gone in range(9):
        kept = torch.arange(9) != gone
        less, _ = clipped_gradient_sum(
            model, task.loss, x[kept], y[kept], clip_norm=CLIP, method=method
        )
        assert float((found - less).norm()) <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_a_broken_example_contributes_nothing(kind):
    task, _, y = made(kind, 5)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    model = network_of(task, y)
    whole, _ = clipped_gradient_sum(model, task.loss, x[1:], y[1:], clip_norm=CLIP)
    x[0] = torch.nan
    found, raw = clipped_gradient_sum(model, task.loss, x, y, clip_norm=CLIP)
    torch.testing.assert_close(found, whole)
    assert raw.refused == 1
