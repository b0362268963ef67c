from copy import deepcopy

import pytest
import torch
from torch import nn

from fedpress.compress import PruningPlan, check_parity, mask_, plan, remove_, score, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import ModelError
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed


class Grouped(nn.Module):
    """A convolution with four channels in each group after one whose channels can go."""

    def __init__(self):
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, groups=4, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.g(self.a(x).relu()).relu().mean((2, 3)))


def halved(model, graph):
    return plan(
        model, graph, score(model, graph, "l1"), keep_params=0.5, round_to=1, tolerance=0.05
    )


def test_a_plan_survives_json_and_gives_the_same_network(traced):
    model, x, graph = traced("residual")
    first = halved(model, graph)
    again = PruningPlan.model_validate_json(first.model_dump_json())
    assert again == first
    one, two = deepcopy(model), deepcopy(model)
    remove_(one, first)
    remove_(two, again)
    assert torch.equal(one.eval()(x), two.eval()(x))


def test_shared_weights_stay_shared(traced):
    model, _, graph = traced("waves")
    small = deepcopy(model)
    remove_(small, halved(model, graph))
    assert small.one.weight is small.two.weight
    assert small.gain.shape == (small.a.out_channels, 1)
    assert (
        small.slope.num_parameters
        == small.a.out_channels
        == small.one.in_features
        == small.one.out_features
    )


def test_module_sizes_follow_their_tensors(traced):
    model, _, graph = traced("separable")
    small = deepcopy(model)
    remove_(small, halved(model, graph))
    assert small.d.in_channels == small.d.groups == small.a.out_channels
    assert (
        small.d.out_channels
        == small.nd.num_features
        == small.p.in_channels
        == 2 * small.a.out_channels
    )
    assert small.head.in_features == small.p.out_channels


def test_memory_format_and_frozen_parameters_are_kept(traced):
    model, _, graph = traced("plain")
    small = deepcopy(model).to(memory_format=torch.channels_last)
    small.b.weight.requires_grad_(False)
    remove_(small, halved(model, graph))
    assert small.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.b.weight.requires_grad
    assert small.a.weight.requires_grad


def test_the_mask_zeroes_exactly_what_is_removed(traced):
    model, _, graph = traced("plain")
    choice = halved(model, graph)
    masked, small = deepcopy(model), deepcopy(model)
    mask_(masked, choice)
    remove_(small, choice)
    for name, tensor in small.named_parameters():
        assert masked.get_parameter(name).count_nonzero() == tensor.count_nonzero()
        torch.testing.assert_close(
            masked.get_parameter(name).sum(), tensor.sum(), atol=1e-4, rtol=0
        )


def test_parity_finds_a_wrong_network(traced):
    model, x, graph = traced("residual")
    choice = halved(model, graph)
    small = deepcopy(model)
    remove_(small, choice)
    with torch.no_grad():
        small.blocks[1].a.weight.copy_(small.blocks[1].a.weight.flip(0))
    with pytest.raises(ModelError, match="differs from the masked one"):
        check_parity(model, small, choice, x)
    with torch.no_grad():
        small.head.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="differs from the masked one by nan"):
        check_parity(model, small, choice, x)


def test_a_size_that_no_call_shows_is_found_by_the_trace_and_by_parity():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 5)

        def forward(self, x):
            x = self.a(x).mean((2, 3))
            return self.head(x / x.shape[1])

    class Plain(Scaled):
        def forward(self, x):
            return self.head(self.a(x).mean((2, 3)))

    model, x = Scaled(), torch.randn(2, 3, 8, 8)
    with pytest.raises(
        ModelError, match="'a': with fewer of its channels the pruned network differs"
    ):
        halved(model, trace(model, x))
    # What is cut all the same, by a plan for the network without that size, does not pass either.
    unscaled = Plain()
    choice, small = halved(unscaled, trace(unscaled, x)), deepcopy(model)
    remove_(small, choice)
    with pytest.raises(ModelError, match=r"differs from the masked one"):
        check_parity(model, small, choice, x)


@pytest.mark.parametrize("change", [remove_, mask_])
def test_a_plan_of_another_model_is_refused_before_anything_changes(traced, change):
    model, _, graph = traced("plain")
    choice = halved(model, graph)
    other = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ModelError, match="which this model lacks"):
        change(other, choice)
    small = deepcopy(model)
    remove_(small, choice)
    before = {n: t.clone() for n, t in small.state_dict().items()}
    with pytest.raises(ModelError, match="does not fit"):
        change(small, choice)
    assert all(torch.equal(before[n], t) for n, t in small.state_dict().items())


def test_groups_of_one_input_each_that_were_wider_come_back_from_the_spec(tmp_path):
    spec = ModelSpec(architecture=f"{__name__}:Grouped", input_shape=(3, 8, 8))
    torch.manual_seed(0)
    dense, x = spec.build().eval(), torch.randn(2, 3, 8, 8)
    small = deepcopy(dense)
    for keep in ({"a": 1}, {"a": 2, "g": 8}):  # to one channel a group, then groups too
        graph = trace(small, x)
        kept = [min(layer.channels, keep.get(layer.name, layer.channels)) for layer in graph.groups]
        plan = make_plan(small, graph, [torch.rand(layer.channels) for layer in graph.groups], kept)
        before = deepcopy(small)
        remove_(small, plan)
        check_parity(before, small, plan, x)
    changed = what_pruning_changed(small, dense)
    assert changed["groups"] == {"g": small.g.groups}
    save_model(tmp_path, spec.model_copy(update=changed), small)
    back = load_model(tmp_path, allow_code=spec.architecture)[1].eval()
    torch.testing.assert_close(back(x), small(x))


class Two(nn.Module):
    """A network of two outputs, the second scaled."""

    def __init__(self, scale):
        super().__init__()
        self.a, self.head, self.scale = nn.Linear(4, 16), nn.Linear(16, 3), scale

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(x), self.head(x).sum(1) * self.scale


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_number_that_is_none_in_any_output_is_seen(scale):
    model, x = Two(1.0), torch.randn(2, 4)
    graph = trace(model, x)
    cut, small = halved(model, graph), deepcopy(model)
    remove_(small, cut)
    check_parity(model, small, cut, x)
    small.scale = scale
    with pytest.raises(ModelError, match="differs from the masked one"):
        check_parity(model, small, cut, x)


def test_outputs_of_any_size_are_compared_relative_to_it():
    model, x = Two(1e-4), torch.randn(2, 4)
    graph = trace(model, x)
    cut, small = halved(model, graph), deepcopy(model)
    remove_(small, cut)
    check_parity(model, small, cut, x)
    small.scale = 1.05e-4
    with pytest.raises(ModelError, match="differs from the masked one"):
        check_parity(model, small, cut, x)


@pytest.mark.parametrize("rows", [(2, 3, 4), (0, 3, 5), (5,)])
@pytest.mark.parametrize("columns", [(0, 1), (0, 2), (1, 2, 3)])
def test_removed_and_masked_weights_are_those_of_plain_indexing(rows, columns):
    keep = {"weight": {0: rows, 1: columns}}
    cut = PruningPlan(keep=keep, layers=(), unprunable={}, parameters_before=24, parameters_after=6)
    dense, small, masked = (nn.Linear(4, 6, bias=False) for _ in range(3))
    small.load_state_dict(dense.state_dict())
    masked.load_state_dict(dense.state_dict())
    before = dense.weight.detach().clone()
    remove_(small, cut)
    mask_(masked, cut)

    inside = torch.zeros(6, 4)
    inside[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1
    assert torch.equal(masked.weight, before * inside)
    assert torch.equal(small.weight, before[list(rows)][:, list(columns)])
    assert small.weight.is_contiguous()


def test_a_removed_weight_has_memory_of_its_own():
    model = nn.Linear(4, 6, bias=False)
    old, keep = model.weight, {"weight": {0: (1, 2, 3)}}
    before = old.detach().clone()
    remove_(
        model,
        PruningPlan(keep=keep, layers=(), unprunable={}, parameters_before=24, parameters_after=12),
    )
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(old, before)
