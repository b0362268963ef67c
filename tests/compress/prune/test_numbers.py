"""Numbers in forward code: found by their place, whatever path the code takes, for any batch."""

import importlib
import json
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.compress import PruningPlan, check_parity, remove_, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.errors import ModelError
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed


def halved(model, x, seed=0):
    graph = trace(model, x)
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(layer.channels, generator=draw) for layer in graph.groups]
    plan = make_plan(model, graph, scores, [(layer.channels + 1) // 2 for layer in graph.groups])
    small = deepcopy(model)
    remove_(small, PruningPlan.model_validate_json(plan.model_dump_json()))
    return graph, plan, small


def same(a, b, x):
    torch.testing.assert_close(a(x), b(x), atol=1e-5, rtol=1e-5)


class Grouped(nn.Module):
    """Grouped-query attention that repeats keys by hand where it is exported, and leaves it to torch elsewhere."""

    def __init__(self, d: int = 64, heads: int = 8, groups: int = 2, early: bool = False) -> None:
        super().__init__()
        self.h, self.kv, self.d, self.early = heads, groups, d // heads, early
        self.q, self.k, self.v = (
            nn.Linear(d, d),
            nn.Linear(d, groups * self.d),
            nn.Linear(d, groups * self.d),
        )
        self.o = nn.Linear(d, d)

    def _repeat(self, x: Tensor) -> Tensor:
        b, _, t, d = x.shape
        return x[:, :, None].expand(b, self.kv, self.h // self.kv, t, d).reshape(b, self.h, t, d)

    def _follow(self, x: Tensor) -> Tensor:
        b, n, t, d = x.shape  # these follow by themselves, and only where it is exported
        return x[:, :, None].expand(b, n, 4, t, d).reshape(b, n * 4, t, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, -1, self.d).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if torch.compiler.is_exporting():
            repeat = self._follow if self.early else self._repeat
            y = F.scaled_dot_product_attention(q, repeat(k), repeat(v))
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(b, t, self.h * self.d)).mean(1)


@pytest.mark.recipe
@pytest.mark.parametrize("early", [False, True])
def test_code_may_take_another_path_when_it_is_exported(early):
    torch.manual_seed(0)
    model, x = Grouped(early=early).eval(), torch.randn(2, 5, 64)
    graph, plan, small = halved(model, x)
    assert [layer.channels for layer in graph.groups] == [
        4
    ]  # one head of each group goes with one of the other
    assert check_parity(model, small, plan, x) <= 1e-5
    free = ({0: torch.export.Dim("n")},)
    exported = torch.export.export(small.eval(), (x,), dynamic_shapes=free, strict=False).module()
    same(exported, small, torch.randn(3, 5, 64))


def test_code_may_take_another_path_while_it_trains():
    class Sometimes(nn.Module):
        """One call more with a number while it trains, before those that both modes make."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x.view(-1, 4, 2).flip(2).reshape(-1, 8)
            h = self.a(x)
            return self.o(torch.cat([h[:, :6].relu(), h[:, 6:].tanh()], 1))

    model, x = Sometimes(), torch.randn(2, 8)
    _, plan, small = halved(model, x)
    assert plan.numbers
    assert check_parity(model, small, plan, x) <= 1e-5


def test_a_loop_has_numbers_of_its_own_for_each_turn_or_one_for_all():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes, self.a = (4, 12, 8), nn.ModuleList(nn.Linear(8, 24) for _ in range(3))
            self.o, self.cell, self.times = nn.Linear(24, 16), nn.Linear(16, 16), 3
            self.last = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            parts = []
            for layer, size in zip(self.a, self.sizes, strict=True):
                parts.append(layer(x)[:, :size])
            h = self.o(torch.cat(parts, 1))
            for _ in range(self.times):
                left, right = torch.tanh(self.cell(h)).split([5, 11], 1)
                h = torch.cat([left, right], 1)
            return self.last(h)

    torch.manual_seed(0)
    model, x = Loop(), torch.randn(2, 8)
    _, plan, small = halved(model, x)
    assert check_parity(model, small, plan, x) <= 1e-5
    calls = plan.numbers[""]
    assert sum("#" in call for call in calls) == 3  # of the slices
    assert sum(call.endswith("split") for call in calls) == 1
    model.times = small.times = 7
    assert check_parity(model, small, plan, x) <= 1e-5


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_a_number_that_counts_examples_too_holds_for_any_batch(examples):
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(24, 72), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = (
                self.qkv(x)
                .view(n, t, 3, 4, 6)
                .permute(2, 0, 3, 1, 4)
                .reshape(3, n * 4, t, 6)
                .unbind(0)
            )
            causal = torch.ones(t, t).tril().log()[None].expand(n * 4, t, t)
            y = torch.softmax(torch.baddbmm(causal, q, k.mT, alpha=6**-0.5), -1) @ v
            return self.o(y.view(n, 4, t, 6).transpose(1, 2).reshape(n, t, 24)).mean(1)

    torch.manual_seed(0)
    model, x = Batched(), torch.randn(examples, 5, 24)
    graph, plan, small = halved(model, x)
    assert [layer.channels for layer in graph.groups] == [4]
    assert check_parity(model, small, plan, x) <= 1e-5
    wide = [value for call in plan.numbers[""].values() for value in call.values()]
    assert wide
    assert all(isinstance(value, tuple) for value in wide)


def build(**_):
    torch.manual_seed(0)
    return Grouped(early=False)


CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.a(x)
        return self.o(torch.cat([part for part in (h[:, 6:].relu(), h[:, :6].tanh())], 1))
"""


def test_code_that_changed_above_a_module_still_opens_and_other_code_is_told(tmp_path, monkeypatch):
    file, name = tmp_path / "changing_net.py", "changing_net:Net"
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text(CODE)
    spec, x = ModelSpec(architecture=name, input_shape=(8,)), torch.randn(2, 8)
    dense = spec.build().eval()
    _, _, small = halved(dense, x)
    save_model(tmp_path / "m", spec.model_copy(update=what_pruning_changed(small, dense)), small)

    def again(code: str) -> nn.Module:
        monkeypatch.delitem(sys.modules, "changing_net")
        file.write_text(code)
        importlib.invalidate_caches()
        return load_model(tmp_path / "m", allow_code=name)[1].eval()

    assert torch.equal(again("# a new line" + CODE)(x), small(x))
    with pytest.raises(
        ModelError,
        match=r"the code of the model itself has changed: .*Net\.forward.*or prune again",
    ):
        again(CODE.replace("        h = ", "        x = x * 1\n        h = "))


def test_the_place_is_a_part_of_the_file(tmp_path):
    spec = ModelSpec(architecture=f"{__name__}:build", input_shape=(5, 64))
    dense, x = build().eval(), torch.randn(2, 5, 64)
    _, _, small = halved(dense, x)
    spec = spec.model_copy(update=what_pruning_changed(small, dense))
    save_model(tmp_path, spec, small)
    text = json.loads((tmp_path / "spec.json").read_text())
    (calls,) = text["numbers"].values()
    assert any(call.startswith("test_numbers.py:Grouped.forward+") for call in calls)
    assert torch.equal(load_model(tmp_path, allow_code=spec.architecture)[1].eval()(x), small(x))


def test_a_spec_of_an_older_version_gives_the_same_network():
    dense, x = build().eval(), torch.randn(2, 5, 64)
    _, _, small = halved(dense, x)
    spec = ModelSpec(architecture=f"{__name__}:build", input_shape=(5, 64))
    changed = what_pruning_changed(small, dense)
    # in eager code: three views, whose numbers follow by themselves, and a reshape to n, t and 8 * 8
    old = json.loads(spec.model_copy(update={**changed, "numbers": {}}).model_dump_json())
    old["numbers"] = {"": {"3": {"2": [1, 2]}}}
    again = ModelSpec.of_file(json.dumps(old), allow_code=spec.architecture).build().eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


class Copies(nn.Module):
    """Divides the number of examples and heads by a number of heads that no call shows (DeBERTa does)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.q, self.places, self.o = (
            4,
            nn.Linear(24, 24),
            nn.Linear(3, 24),
            nn.Linear(24, 16),
        )
        self.register_buffer("far", torch.randn(5, 3))
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, -1, 6).transpose(1, 2).reshape(-1, t, 6)
        places = (
            self.places(self.far)
            .view(5, -1, 6)
            .permute(1, 2, 0)
            .repeat(q.size(0) // self.heads, 1, 1)
        )
        y = torch.bmm(q, places).softmax(-1) @ q
        return self.last(
            self.o(y.view(n, -1, t, 6).transpose(1, 2).reshape(n, t, -1)).relu().mean(1)
        )


def test_layers_whose_channels_the_code_cannot_run_without_stay_whole_with_what_it_says():
    torch.manual_seed(0)
    model, x = Copies(), torch.randn(3, 5, 24)
    graph, plan, small = halved(model, x)
    assert [layer.name for layer in graph.groups] == ["o"]
    assert "the code does not run with fewer of its channels" in plan.unprunable["q"]
    assert check_parity(model, small, plan, x) <= 1e-5


def test_numbers_that_follow_are_found_behind_others_that_count_examples_too():
    class Chain(nn.Module):
        """Each view's numbers follow by themselves; the last, far behind them, does not."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            n, h = len(x), self.a(x)
            for _ in range(3):
                h = h.view(n, h.shape[1]).tanh().reshape(n * h.shape[1]).view(n, -1)
            return self.o(h.reshape(n * 16).view(n, 16))

    model, x = Chain(), torch.randn(2, 8)
    _, plan, small = halved(model, x)
    assert check_parity(model, small, plan, x) <= 1e-5
    assert {n for call in plan.numbers[""].values() for n in call.values()} == {(8, 16)}
    assert len(plan.numbers[""]) == 2


@pytest.mark.parametrize("named", [True, False])
def test_groups_of_a_filter_that_is_the_same_for_all_channels_follow_them(named):
    class Blurred(nn.Module):
        """Anti-aliased pooling: a buffer of one kernel a channel, and the stored number of channels."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.o, self.channels = (
                nn.Conv2d(3, 24, 3),
                nn.Conv2d(24, 16, 1),
                nn.Linear(16, 3),
                24,
            )
            kernel = torch.tensor([1.0, 2.0, 1.0])
            self.register_buffer(
                "kernel", (kernel[:, None] * kernel / 16)[None, None].repeat(24, 1, 1, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            h = F.pad(self.a(x).relu(), (1, 1, 1, 1), mode="reflect")
            if named:
                h = F.conv2d(h, self.kernel, stride=2, groups=self.channels)
            else:
                h = F.conv2d(h, self.kernel, None, (2, 2), 0, 1, self.channels)
            return self.o(self.b(h).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, x = Blurred(), torch.randn(2, 3, 8, 8)
    _, plan, small = halved(model, x)
    assert [layer.name for layer in plan.layers] == ["a", "b"]
    assert small.kernel.shape[0] == 12
    assert check_parity(model, small, plan, x) <= 1e-5
