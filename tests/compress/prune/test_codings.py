"""What people write by hand in the place of a layer: each is cut exactly, whatever the widths."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.compress import check_parity, macs, remove_, trace
from fedpress.compress.prune.plan import make_plan


class Net(nn.Module):
    """A convolution, what a subclass does with its 16 channels, a mean and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.q, self.k, self.v, self.p = (nn.Linear(16, 16) for _ in range(4))
        self.one, self.two, self.wide = (
            nn.Conv2d(16, 16, 1),
            nn.Conv2d(16, 16, 1),
            nn.Conv2d(16, 64, 1),
        )

    def forward(self, x):
        return self.head(self.between(F.relu(self.a(x))).mean((2, 3)))


class Windows(Net):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def between(self, x):
        n, c, h, w = x.shape
        x = (
            x.permute(0, 2, 3, 1)
            .view(n, h // 4, 4, w // 4, 4, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, 16, c)
        )
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.p(y.transpose(1, 2).reshape(-1, 16, c)).view(n, h // 4, w // 4, 4, 4, -1)
        return y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1).permute(0, 3, 1, 2)


class HeadsInTheBatch(Net):
    def between(self, x):
        n, _, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (
            layer(x).view(n, -1, 4, 4).transpose(1, 2).reshape(n * 4, -1, 4)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, dim=-1), v)
        y = y.view(n, 4, -1, 4).transpose(1, 2).reshape(n, h * w, 16)
        return self.p(y).transpose(1, 2).view(n, -1, h, w)


class SharedKeys(Net):
    def __init__(self):
        super().__init__()
        self.q, self.p = nn.Linear(16, 32), nn.Linear(32, 16)

    def between(self, x):
        n, _, h, w = x.shape
        x = x.flatten(2).mT
        q, k, v = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        k = k[:, :, None].expand(n, 4, 2, -1, 4).reshape(n, 8, -1, 4)
        y = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, 1))
        return self.p(y.transpose(1, 2).flatten(2)).mT.unflatten(2, (h, w))


class Grouped(SharedKeys):
    def between(self, x):
        n, _, h, w = x.shape
        x = x.flatten(2).mT
        q, k, v = (
            layer(x).view(n, h * w, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.p(y.transpose(1, 2).flatten(2)).mT.unflatten(2, (h, w))


class Decoder(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, dropout=0.0)

    def between(self, x):
        x = x.flatten(2).mT
        return self.layer(x, x.flip(1)).mT.unflatten(2, (8, 8))


class InPlace(Net):
    def between(self, x):
        y = torch.zeros(x.shape[0], 16, 8, 8)
        y[:, 4:] = self.one(x)[:, :12]
        y[:, :4] += 1
        return self.two(y)


class Reused(Net):
    def __init__(self):
        super().__init__()
        self.part = Swap()

    def between(self, x):
        return self.part(self.part(self.one(x)))


class Swap(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        left, right = self.a(x).split([6, 10], 1)
        return torch.cat([right, left], 1)


class Pixels(Net):
    def between(self, x):
        x = self.wide(x)
        n, _, h, w = x.shape
        return x.view(n, 16, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, 16, h * 2, w * 2)


class Selective(Net):
    def between(self, x):
        both = torch.stack([self.one(x), self.two(x)], 1)
        return (both * both.mean((3, 4), keepdim=True).softmax(1)).sum(1)


class Letters(Net):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(16, 12)), nn.Conv2d(12, 16, 1)

    def between(self, x):
        return self.b(torch.einsum("nchw,cd->ndhw", x, self.w))


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("build", "removable"),
    [
        (Windows, {"a": 16, "qkv": 4, "p": 16}),
        (HeadsInTheBatch, {"a": 16, "q": 4, "p": 16}),
        (SharedKeys, {"a": 16, "q": 4, "p": 16}),
        (Grouped, {"a": 16, "q": 4, "p": 16}),
        (Decoder, {"layer.self_attn": 4, "layer.multihead_attn": 4, "layer.linear1": 24}),
        (InPlace, {"a": 16, "one": 12, "one#2": 4, "two": 16}),
        (Reused, {"a": 16, "one": 10, "one#2": 6}),
        (Pixels, {"a": 16, "wide": 16}),
        (Selective, {"a": 16, "one": 16}),
        (Letters, {"a": 16, "": 12, "b": 16}),
    ],
)
def test_what_is_written_by_hand_is_cut_exactly(build, removable):
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    assert {layer.name: layer.channels for layer in graph.groups} == removable
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        kept = [
            int(torch.randint(1, layer.channels + 1, (), generator=draw)) for layer in graph.groups
        ]
        plan = make_plan(
            model,
            graph,
            [torch.rand(layer.channels, generator=draw) for layer in graph.groups],
            kept,
        )
        small = deepcopy(model)
        remove_(small, plan)
        assert check_parity(model, small, plan, x) <= 1e-5
        assert macs(small, x[:1]) == graph.macs(kept)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.LSTM(6, 16, proj_size=8, batch_first=True), "a projected state"),
        (lambda: Given(), "it is combined with an axis of fixed size"),
    ],
)
def test_recurrent_states_whose_size_others_say_stay_whole(build, reason):
    class Series(nn.Module):
        def __init__(self):
            super().__init__()
            self.r, self.head = build(), nn.Linear(8, 5)

        def forward(self, x, state):
            y = self.r(x) if isinstance(self.r, nn.LSTM) else self.r(x, state)
            return self.head(y[0][:, -1, :8])

    graph = trace(Series(), (torch.randn(2, 4, 6), torch.randn(1, 2, 16)))
    assert not graph.groups
    assert any(reason in why for name, why in graph.unprunable.items() if name.startswith("r"))


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(6, 16, batch_first=True)

    def forward(self, x, state):
        return self.cell(x, state)
