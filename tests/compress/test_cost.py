from copy import deepcopy

import pytest
import torch
from torch import nn

from fedpress.compress import latency, macs, parameters, plan, remove_, score, state_bytes
from fedpress.compress.cost import activations


def test_macs_of_convolutions_and_linear_layers_are_exact():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 3, 1, 1, groups=4),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    by_hand = 16 * 8 * 3 * 9 + 16 * 8 * 2 * 9 + 128 * 5
    assert macs(model, torch.randn(1, 3, 8, 8)) == by_hand
    assert macs(model, torch.randn(3, 3, 8, 8)) == 3 * by_hand


def test_resnet18_has_its_known_size():
    from fedpress.models.resnet import resnet18

    model = resnet18()
    assert parameters(model) == 11_173_962
    assert 550e6 < macs(model, torch.zeros(1, 3, 32, 32)) < 560e6
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert state_bytes(model) == 4 * 11_173_962 + buffers


def test_removal_shows_in_every_cost(traced):
    model, x, graph = traced("plain")
    small = deepcopy(model)
    remove_(small, plan(model, graph, score(model, graph, "l1"), keep_params=0.5, tolerance=0.05))
    for cost in (parameters, state_bytes, lambda m: macs(m, x)):
        assert cost(small) < 0.7 * cost(model)


def test_shared_weights_are_counted_once(traced):
    model, _, _ = traced("waves")
    assert parameters(model) == 240 + 16 + 16 + 256 + 32 + 85
    assert state_bytes(model) == 4 * (parameters(model) + 16)


def test_a_buffer_that_is_a_part_of_another_counts_by_itself():
    model = nn.Module()
    model.register_buffer("whole", torch.zeros(10))
    model.register_buffer("part", model.whole[:2])
    model.register_buffer("same", model.whole.view(10))
    assert state_bytes(model) == 4 * (10 + 2)


def test_tensors_without_values_have_their_own_bytes():
    assert state_bytes(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to("meta")) == 4 * 2 * 12


def test_latency_is_measured_on_one_thread_and_puts_things_back():
    threads, seen = torch.get_num_threads(), []
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model.register_forward_hook(
        lambda m, args, out: seen.append((torch.get_num_threads(), len(args[0]), m.training))
    )
    result = latency(model, torch.randn(4, 3), repeats=7, warmup=2)
    assert seen == [(1, 1, False)] * 9
    assert result.median_ms > 0
    assert result.spread_ms >= 0
    assert model.training
    assert torch.get_num_threads() == threads


def test_activations_count_what_every_innermost_layer_gives():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 5)
    ).train()
    assert activations(model, torch.randn(2, 3, 8, 8)) == 2 * (128 + 128 + 128 + 5)
    assert model.training
    assert not model[0]._forward_hooks


class Pair(nn.Module):
    """Cannot take one example alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        if len(x) < 2:
            raise RuntimeError("too few")
        return self.head(x)


def test_costs_of_a_network_that_takes_no_single_example_are_half_of_those_of_two():
    assert macs(Pair(), torch.zeros(1, 6)) == macs(nn.Linear(6, 3), torch.zeros(1, 6)) == 18
    assert activations(Pair(), torch.zeros(1, 6)) == 3
    assert latency(Pair(), torch.zeros(1, 6), repeats=3, warmup=1).median_ms > 0
    with pytest.raises(RuntimeError, match="shape"):
        macs(nn.Linear(6, 3), torch.zeros(1, 5))
