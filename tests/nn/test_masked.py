import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fedpress.errors import ModelError
from fedpress.models import ModelSpec, load_model, save_model
from fedpress.nn.masked import absorb_masks_

X = torch.linspace(-1, 1, 12).view(2, 6)


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))


def plain(model):
    """Says whether nothing but parameters and modules is left."""
    hooks = any(m._forward_pre_hooks for m in model.modules())
    return (
        not hooks
        and not any(parametrize.is_parametrized(m) for m in model.modules())
        and not list(model.buffers())
    )


def test_masks_of_torch_prune_become_zeros():
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.5)  # a container of two masks
    prune.ln_structured(model[2], "weight", 2, n=2, dim=0)
    prune.l1_unstructured(model[2], "bias", 1)
    with torch.no_grad():
        wanted = model(X)
    zeros = {"0.weight": model[0].weight == 0, "2.weight": model[2].weight == 0}
    names = absorb_masks_(model)
    assert set(names) == {"0.weight", "2.weight", "2.bias"}
    assert plain(model)
    with torch.no_grad():
        assert torch.equal(model(X), wanted)
    for name, zero in zeros.items():
        assert torch.equal(dict(model.named_parameters())[name] == 0, zero)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    assert sorted(model.state_dict()) == sorted(network().state_dict())


def test_global_pruning_and_other_parameter_names_are_taken_in():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(6, 6))

        def forward(self, x):
            return x @ self.kernel

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), nn.GRU(6, 4))
    prune.global_unstructured(
        [(model[0], "kernel"), (model[1], "weight_hh_l0")], prune.RandomUnstructured, amount=0.5
    )
    kernel = model[0].kernel.detach().clone()
    assert set(absorb_masks_(model)) == {"0.kernel", "1.weight_hh_l0"}
    assert plain(model)
    assert torch.equal(model[0].kernel, kernel)
    model(X[:, None])
    with torch.no_grad():
        model[1].weight_hh_l0.fill_(1.0)  # what runs is what is kept
    assert model[1]._flat_weights[1] is model[1].weight_hh_l0


def test_masks_that_are_parametrizations_become_zeros():
    model = network()
    mask = (torch.arange(36) % 2).view(6, 6).float()
    parametrize.register_parametrization(model[0], "weight", Masked(mask))
    parametrize.register_parametrization(model[0], "weight", Masked(mask.T.contiguous()))
    wanted = model(X).detach()
    assert absorb_masks_(model) == ("0.weight",)
    assert plain(model)
    assert torch.equal(model(X).detach(), wanted)
    assert torch.equal(model[0].weight != 0, (mask * mask.T).bool())


def test_a_shared_weight_with_one_mask_stays_shared():
    model = network()
    model[2].weight = model[0].weight
    mask = (torch.arange(36) % 3 > 0).view(6, 6)
    for layer in (model[0], model[2]):
        prune.custom_from_mask(layer, "weight", mask)
    wanted = model(X).detach()
    assert absorb_masks_(model) == ("0.weight",)
    assert model[0].weight is model[2].weight
    assert torch.equal(model(X).detach(), wanted)


@pytest.mark.parametrize("second", ["none", "other"])
def test_a_shared_weight_with_two_masks_is_refused(second):
    model = network()
    model[2].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", 0.5)
    if second == "other":
        prune.random_unstructured(model[2], "weight", 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"'\d\.weight' is masked"):
        absorb_masks_(model)
    assert before.keys() == model.state_dict().keys()


def test_other_computed_weights_stay_and_mixtures_are_refused():
    model = network()
    parametrizations.weight_norm(model[0])
    assert absorb_masks_(model) == ()
    assert parametrize.is_parametrized(model[0])
    parametrize.register_parametrization(model[0], "weight", Masked(torch.ones(6, 6)))
    with pytest.raises(ModelError, match="has another parametrization too"):
        absorb_masks_(model)


def test_a_plain_model_is_left_as_it_is():
    model = network()
    before = list(model.parameters())
    assert absorb_masks_(model) == ()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_a_function_that_gives_a_masked_model_is_saved_and_loaded_as_a_sparse_one(
    tmp_path, monkeypatch
):
    (tmp_path / "mine_masked.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.nn.utils import prune\n"
        "def make():\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))\n"
        "    prune.l1_unstructured(model[1], 'weight', 0.75)\n"
        "    return model\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    spec, model = ModelSpec(architecture="mine_masked:make", input_shape=(6,)).build_for_user()
    assert spec.sparse == ("1.weight",)
    assert int((model[1].weight != 0).sum()) == 12
    save_model(tmp_path / "saved", spec, model)
    again, loaded = load_model(tmp_path / "saved")
    assert again == spec
    assert plain(loaded)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
