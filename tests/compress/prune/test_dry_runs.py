"""Runs without values: they must see what real runs see, and leave the model as it was."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.compress import trace
from fedpress.compress.prune.dry_runs import CalledFunctions, dry_calls, meta_copy, smaller_images

NOTED: set[tuple[str, bool, tuple[int, ...]]] = set()
"""Inputs of `Noting`: device, whether it is a plain tensor, shape."""


class Noting(nn.Module):
    """Notes its inputs; the same in every run, so that all runs call the same functions."""

    def forward(self, x: Tensor) -> Tensor:
        NOTED.add((x.device.type, type(x) is Tensor, tuple(x.shape)))
        return x


class Scaled(nn.Module):
    """Convolutions and a pooling; above `limit` pixels the code does something else."""

    def __init__(self, limit: int = 10**9, wrong: bool = False) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, 4), nn.BatchNorm2d(16)
        self.b, self.head = nn.Conv2d(16, 12, 3, 2), nn.Linear(12, 5)
        self.limit, self.wrong, self.width = limit, wrong, 16

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)))
        if x.shape[-1] > self.limit:
            h = h + h.abs()
            if self.wrong:
                h = h * (h.shape[1] / self.width)
        return self.head(self.b(h).mean((2, 3)))


def sizes_run(model, x):
    """Traces; returns the graph and the shapes of the images on which networks really ran."""
    NOTED.clear()
    graph = trace(nn.Sequential(Noting(), model), x)
    return graph, {shape for device, plain, shape in NOTED if device == "cpu" and plain}


def test_large_images_are_compared_on_their_corners():
    graph, seen = sizes_run(Scaled(), torch.randn(2, 3, 200, 160))
    assert len(graph.groups) == 2
    assert seen == {(3, 3, 64, 64)}


def test_code_that_does_something_else_with_large_images_is_compared_on_large_images():
    graph, seen = sizes_run(Scaled(limit=100), torch.randn(2, 3, 160, 160))
    assert len(graph.groups) == 2
    assert (3, 3, 160, 160) in seen


def test_a_fault_that_only_large_images_show_is_found():
    torch.manual_seed(0)
    graph = trace(Scaled(limit=100, wrong=True), torch.randn(2, 3, 160, 160))
    assert [group.name for group in graph.groups] == ["b"]
    assert "with fewer of its channels" in graph.unprunable["a"]


def test_a_network_for_one_size_is_compared_on_that_size():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 20 * 20, 6), nn.Linear(6, 2)
    )
    graph, seen = sizes_run(model, torch.randn(2, 3, 160, 160))
    assert len(graph.groups) == 2
    assert (3, 3, 160, 160) in seen


@pytest.mark.parametrize(
    ("make", "shape"), [(Scaled, (2, 3, 32, 32)), (lambda: nn.LSTM(4, 8), (2, 5, 4))]
)
def test_a_dry_run_calls_what_a_real_run_calls_and_leaves_the_model(make, shape):
    model = make().eval()
    batch = [torch.randn(shape)]
    before = deepcopy(model.state_dict())
    called = CalledFunctions()
    with torch.no_grad(), called:
        model(*batch)
    assert dry_calls(lambda: meta_copy(model), batch) == called.functions
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_shared_tensors_stay_shared_without_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    copy = meta_copy(model)
    assert copy[0].weight is copy[1].weight
    assert copy[0].weight.is_meta
    assert not model[0].weight.is_meta


def test_code_that_reads_values_has_no_dry_run():
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / float(x.max())

    assert dry_calls(lambda: meta_copy(Reads()), [torch.ones(2)]) is None


def test_images_of_two_sizes_and_small_ones_stay_whole():
    assert smaller_images([torch.zeros(2, 3, 224, 224), torch.zeros(2, 1, 112, 112)]) is None
    assert smaller_images([torch.zeros(2, 3, 120, 120)]) is None
    assert smaller_images([torch.zeros(2, 30)]) is None
    (wide,) = smaller_images([torch.zeros(2, 3, 100, 1024)])
    assert wide.shape == (2, 3, 100, 256)


class Norms(nn.Module):
    """Batch norms that a dry run only checks, and one that uses the statistics of the batch."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.a = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(width)
        self.b, self.c = nn.BatchNorm2d(8, affine=False), nn.BatchNorm1d(8)
        self.d = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.d(self.b(self.a(self.conv(x)))).mean((2, 3)))


def test_dry_batch_norms_call_the_functions_of_a_real_run():
    model, x, real = Norms(), torch.randn(2, 3, 8, 8), CalledFunctions()
    with real:
        model.eval()(x)
    assert dry_calls(lambda: meta_copy(model), [x]) == real.functions


def test_dry_batch_norms_see_a_wrong_width():
    assert dry_calls(lambda: meta_copy(Norms(7)), [torch.randn(2, 3, 8, 8)]) is None
