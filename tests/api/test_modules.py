"""Modules in memory that earlier calls have changed: what was cut, masked and rounded is kept."""

import pytest
import torch
from torch import nn

import fedpress
from fedpress.errors import ModelError
from fedpress.models import memory

X = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.width = width
        self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))
"""
NEXT = {
    "quantize": {"bits": 8},
    "train": {"data": (X, Y), "epochs": 1},
    "federate": {"clients": {"a": (X, Y)}, "num_rounds": 1, "lr": 0.1},
    "prune": {"keep_params": 0.7, "round_to": 1},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own class, which can be imported."""
    name = f"own_nets_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__(name).Net()


def cut(module):
    return fedpress.prune(module, input_shape=(8,), keep_params=0.5, round_to=1, score="l1")


@pytest.mark.recipe
@pytest.mark.parametrize("kind", NEXT)
def test_a_cut_module_of_ones_own_class_is_still_saved_after_one_more_call(own, kind, tmp_path):
    small = cut(own)
    shape = {} if "data" in NEXT[kind] or "clients" in NEXT[kind] else {"input_shape": (8,)}
    again = getattr(fedpress, kind)(small.model, **shape, **NEXT[kind])
    assert again.spec is not None
    name = f"{type(own).__module__}:Net"
    for number, model in enumerate((again, again.model)):
        path = fedpress.save(model, tmp_path / str(number))
        opened = fedpress.load(path, allow_code=name)
        assert torch.equal(opened(X), again.model.eval()(X))
    assert list(fedpress.pack(again, input_shape=(8,)).files) == ["model.packed.safetensors"]
    written = fedpress.quantize(again, input_shape=(8,), bits=4, out=tmp_path / "run")
    assert (
        fedpress.load(tmp_path / "run", allow_code=name).a.weight.shape
        == again.model.a.weight.shape
    )
    assert written.before["parameters"] == again.after["parameters"]


def test_a_second_cut_counts_from_the_module_that_is_given(own):
    small = cut(own)
    for key in ("keep_params", "keep_macs"):
        less = fedpress.prune(small.model, input_shape=(8,), round_to=1, score="l1", **{key: 0.5})
        assert less.after["parameters"] < 0.6 * small.after["parameters"]


class Here(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 2)
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layers(x) * self.scale


@pytest.mark.parametrize("make", [Here, lambda: Here().layers])
def test_zeros_stay_zero_when_a_sparse_result_is_trained(make, own):
    class Inner(Here):  # nothing can import it, so only this process builds it
        pass

    for module in (make(), own, Inner()):
        sparse = fedpress.sparsify(module, data=(X, Y), density=0.25)
        trained = fedpress.train(sparse, data=(X, Y), epochs=1)
        zeros = [int((p == 0).sum()) for p in sparse.model.parameters()]
        assert sum(zeros) > 100
        assert [int((p == 0).sum()) for p in trained.model.parameters()] == zeros


def test_a_cut_module_that_only_this_process_builds_is_told_what_helps(tmp_path):
    class Inner(Here):
        pass

    small = cut(Inner())
    assert small.spec is None
    again = fedpress.quantize(small, input_shape=(8,), bits=8)
    calls = (
        lambda: fedpress.save(again, tmp_path / "a"),
        lambda: fedpress.pack(again, input_shape=(8,)),
        lambda: fedpress.quantize(again.model, input_shape=(8,), bits=4, out=tmp_path / "b"),
    )
    for call in calls:
        with pytest.raises(
            ModelError, match=r"import it from there.*then repeat the calls"
        ) as told:
            call()
        assert "checkpoint" not in str(told.value)


def test_a_result_that_its_user_has_changed_is_taken_as_it_is_now(own):
    small = cut(own)
    assert memory.spec_that_builds(small.model) is not None
    small.model.c.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert memory.spec_that_builds(small.model) is None
    twice = fedpress.quantize(small.model, input_shape=(8,), bits=8)
    assert torch.allclose(twice.model.eval()(X), small.model.eval()(X), atol=0.2)
