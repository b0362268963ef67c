"""Muon in float32: the same optimizer as torch's, and Newton-Schulz on the short side against its plain form."""

import copy

import pytest
import torch
from torch import nn

from fedpress.training.optimizers import Muon, orthogonalized


def plain(matrix):
    """Five steps on the whole matrix, in float64."""
    x = matrix.double() / matrix.double().norm()
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def with_singular_values(values, columns):
    left = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    right = torch.linalg.qr(torch.randn(columns, len(values))).Q
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("shape", [(64, 64), (32, 288), (288, 32), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_short_side_gives_what_the_whole_matrix_gives(shape, scale):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * scale
    torch.testing.assert_close(orthogonalized(matrix).double(), plain(matrix), atol=2e-5, rtol=0)


@pytest.mark.parametrize("smallest", [-2, -5, -9])
def test_small_singular_values_do_not_blow_up(smallest):
    torch.manual_seed(0)
    matrix = with_singular_values(torch.logspace(0, smallest, 64), 288)
    torch.testing.assert_close(orthogonalized(matrix).double(), plain(matrix), atol=1e-4, rtol=0)
    assert torch.linalg.svdvals(orthogonalized(matrix)).max() < 1.25


def test_singular_values_go_to_one_and_vectors_stay():
    torch.manual_seed(0)
    matrix = with_singular_values(torch.linspace(0.2, 3, 16), 48)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalized(matrix) @ right.T
    assert (inner.diagonal() > 0.65).all()
    assert (inner.diagonal() < 1.25).all()
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-5, rtol=0)


def test_nothing_gives_nothing_and_the_number_type_stays():
    assert torch.equal(orthogonalized(torch.zeros(4, 8)), torch.zeros(4, 8))
    assert orthogonalized(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64
    assert orthogonalized(torch.randn(8, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_steps_are_those_of_torch_but_for_its_bfloat16():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in ((16, 48), (48, 16), (8, 8))]
    still = nn.Parameter(torch.randn(4, 4))
    twins = copy.deepcopy(mine)
    ours = Muon([*mine, still], 0.02, momentum=0.8, weight_decay=0.1)
    theirs = torch.optim.Muon(twins, 0.02, weight_decay=0.1, momentum=0.8)
    before = still.detach().clone()
    start = copy.deepcopy(mine)
    for _ in range(6):
        for p, twin in zip(mine, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin, first in zip(mine, twins, start, strict=True):
        way = (p - first).norm()
        assert (p - twin).norm() < 0.02 * way  # 8 bits of mantissa, five squarings
    assert torch.equal(still, before)


def test_a_run_that_torch_began_goes_on():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 24))
    theirs = torch.optim.Muon([weight], 0.02, momentum=0.8)
    weight.grad = torch.randn_like(weight)
    theirs.step()
    ours = Muon([weight], 0.5, momentum=0.1)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.02
    assert ours.param_groups[0]["momentum"] == 0.8
    assert torch.equal(
        ours.state[weight]["momentum_buffer"], theirs.state[weight]["momentum_buffer"]
    )
    assert ours.step(lambda: 3.0) == 3.0
