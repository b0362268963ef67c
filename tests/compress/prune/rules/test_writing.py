"""What is written to places of a tensor and where it stands go together, and the indices in the code follow."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fedpress.compress import check_parity, parameters, remove_, trace
from fedpress.compress.prune.plan import make_plan
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed

ORDER = torch.tensor([5, 30, 2, 17, 9, 0, 31, 12, 26, 21, 7, 14])
MASK = torch.zeros(32, dtype=torch.bool).index_fill_(0, ORDER, True)


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 32)


def put(h: Tensor, z: Tensor, index: Tensor) -> Tensor:
    z[:, index] = h
    return z


def sliced(h: Tensor, z: Tensor, at: slice) -> Tensor:
    z[:, at] = h
    return z


def filled(h: Tensor, z: Tensor) -> Tensor:
    z[:, :12] = h
    z[:, 12:24] = h * 2
    z[:, 24:] = 1
    return z


def rows(h: Tensor) -> Tensor:
    return ORDER[: h.shape[1]].expand(h.shape[0], -1)


# Each takes h [n, 12], made by one layer, and z [n, 32], zeros or made by another.
FORMS = {
    "index": lambda h, z, m: put(h, z, torch.arange(12) + 4),
    "negative": lambda h, z, m: put(h, z, torch.arange(-12, 0)),
    "buffer": lambda h, z, m: put(h, z, m.order),
    "mask": lambda h, z, m: put(h, z, MASK),
    "list": lambda h, z, m: put(h, z, [3, 1, 4, 15, 9, 2, 6, 5, 30, 8, 7, 11]),
    "put": lambda h, z, m: z.index_put((torch.arange(z.shape[0])[:, None], ORDER[None]), h),
    "put accumulates": lambda h, z, m: z.T.index_put((ORDER,), h.T, accumulate=True).T,
    "copy": lambda h, z, m: z.index_copy(1, ORDER, h),
    "add": lambda h, z, m: torch.index_add(z, dim=1, index=m.order, source=h, alpha=0.5),
    "add in place": lambda h, z, m: z.index_add_(1, ORDER, h),
    "fill": lambda h, z, m: z.index_fill(1, ORDER, 2.0) + h.sum(1, keepdim=True) * 0,
    "scatter": lambda h, z, m: z.scatter(1, ORDER.expand(h.shape[0], -1), h),
    "scatter in place": lambda h, z, m: z.scatter_(-1, index=ORDER.repeat(h.shape[0], 1), src=h),
    "scatter value": lambda h, z, m: z.scatter(1, ORDER.expand(h.shape[0], -1), 3.0),
    "scatter add": lambda h, z, m: torch.scatter_add(z, 1, ORDER.expand(h.shape[0], -1), h),
    "scatter reduce": lambda h, z, m: z.scatter_reduce(1, ORDER.expand(h.shape[0], -1), h, "amax"),
    "slice": lambda h, z, m: sliced(h, z, slice(4, 16)),
    "end": lambda h, z, m: sliced(h, z, slice(-12, None)),
    "parts": lambda h, z, m: filled(h, z),
    "empty": lambda h, z, m: filled(h, torch.empty(h.shape[0], 32)),
    "masked": lambda h, z, m: z.masked_scatter(MASK, h),
    "where": lambda h, z, m: torch.where(MASK, z, torch.cat([h, h, h[:, :8]], 1)),
}


class Written(nn.Module):
    """Two layers, of which one writes into the other or into zeros, and one that reads."""

    def __init__(self, form: str, own: bool) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(16, 12), nn.Linear(16, 32), nn.Linear(32, 5)
        self.register_buffer("order", ORDER.clone())
        self.form, self.own = FORMS[form], own

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(x).sigmoid() if self.own else torch.zeros(x.shape[0], 32)
        return self.o(self.form(torch.sigmoid(self.a(x)), z, self))


def build(form: str, own: bool) -> nn.Module:
    torch.manual_seed(0)
    return Written(form, own)


def cut(model, x, seed, unprunable=()):
    graph = trace(model, x, unprunable=unprunable)
    draw = torch.Generator().manual_seed(seed)
    kept = [int(torch.randint(1, layer.channels + 1, (), generator=draw)) for layer in graph.groups]
    plan = make_plan(
        model, graph, [torch.rand(layer.channels, generator=draw) for layer in graph.groups], kept
    )
    small = deepcopy(model)
    remove_(small, plan)
    assert parameters(small) == plan.parameters_after
    check_parity(model, small, plan, x)
    return graph, small


@pytest.mark.parametrize("own", [False, True], ids=["zeros", "layer"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_to_places_is_cut_exactly_or_stays_whole(form, own):
    cut(build(form, own), torch.randn(2, 16), seed=int(own))


@pytest.mark.parametrize(
    "form", ["index", "buffer", "mask", "list", "copy", "add", "scatter", "scatter reduce", "end"]
)
def test_a_channel_and_the_place_that_it_is_written_to_are_one_layer(form):
    graph = trace(build(form, True), torch.randn(2, 16))
    written = next(layer for layer in graph.groups if layer.channels == 12)
    tensors = {s.tensor for s in written.slices}
    assert tensors >= {"a.weight", "a.bias", "b.weight", "b.bias", "o.weight"}
    assert {layer.channels for layer in graph.groups} == {12, 20}


@pytest.mark.parametrize("form", ["put", "masked", "where"])
def test_places_that_cannot_follow_keep_what_is_written_whole_with_a_reason(form):
    graph = trace(build(form, True), torch.randn(2, 16))
    assert not graph.groups
    assert {"a", "b"} <= set(graph.unprunable)


@pytest.mark.parametrize("form", ["index", "buffer", "mask", "scatter", "add"])
def test_indices_that_follow_are_a_part_of_the_file_and_of_a_further_cut(form, tmp_path):
    x = torch.randn(2, 16)
    dense = build(form, True)
    _, small = cut(dense, x, 0)
    _, smaller = cut(small, x, 1)
    spec = ModelSpec(
        architecture=f"{__name__}:build", arguments={"form": form, "own": True}, input_shape=(16,)
    )
    changed = what_pruning_changed(smaller, dense)
    save_model(tmp_path, spec.model_copy(update=changed), smaller)
    again = load_model(tmp_path, allow_code=spec.architecture)[1].eval()
    assert torch.equal(again(x), smaller.eval()(x))
    free = ({0: torch.export.Dim("n")},)
    program = torch.export.export(smaller, (x,), dynamic_shapes=free, strict=False).module()
    torch.testing.assert_close(program(torch.cat([x, x])), smaller(torch.cat([x, x])))


class Tokens(nn.Module):
    """Rows of channels are written to places along another axis, by known and by looked-up indices."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.o, self.how = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 3), how

    def forward(self, x: Tensor) -> Tensor:
        rows, z = torch.relu(self.a(x)), self.b(x.flip(1))
        best = x[:, :, 0].topk(2, 1).indices
        if self.how == "put":
            z[:, [0, 2]] = rows[:, :2]
        elif self.how == "unknown":
            z[torch.arange(x.shape[0])[:, None], best] = rows[:, :2]
        elif self.how == "add":
            z = z.flatten(0, 1).index_add(0, best.flatten(), rows[:, :2].flatten(0, 1)).view_as(z)
        elif self.how == "scatter":
            z = z.scatter(1, best[:, :, None].expand(-1, -1, rows.shape[-1]), rows[:, :2])
        elif self.how == "chosen":
            z[x[:, :, 0] > 0] = 1.5
        elif self.how == "masked":
            z = z.masked_scatter((x[:, :, :1] > 0), rows)
        return self.o(z).mean(1)


@pytest.mark.parametrize("how", ["put", "unknown", "add", "scatter", "chosen", "masked"])
def test_channels_pass_where_rows_of_them_are_written_by_number(how):
    torch.manual_seed(0)
    graph, _ = cut(Tokens(how), torch.randn(2, 5, 8), 0)
    assert 24 in {layer.channels for layer in graph.groups}
