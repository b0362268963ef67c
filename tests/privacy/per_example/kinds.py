"""Networks of many kinds that private steps must know: parameters, inputs and layers beyond plain image networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Scale(nn.Module):
    """A parameter without dimensions and one of one value."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.a + self.b


class Tokens(nn.Module):
    """Embeds whole numbers, sent as floats, and runs `body` on [n, 6, 8]."""

    def __init__(self, body=None, **embedding):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8, **embedding), body, nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x.long())
        if isinstance(self.body, nn.RNNBase):
            h = self.body(h)[0]
        elif isinstance(self.body, nn.MultiheadAttention):
            h = self.body(h, h, h)[0]
        return self.head(h.mean(1))


class Bag(nn.Module):
    def __init__(self, **bag):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(20, 8, **bag), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.embed(x.long()))


class Tied(nn.Module):
    """The same weight embeds the words and scores them."""

    def __init__(self):
        super().__init__()
        self.embed, self.out, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 20, bias=False),
            nn.Linear(20, 3),
        )
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.out(self.embed(x.long()).mean(1))))


class Raw(nn.Module):
    """An embedding without a module that says so."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(20, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.embedding(x.long(), self.table).mean(1))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.both(x[:, :3], x[:, 3:])


class Squeezes(nn.Module):
    """Cannot take a batch of one."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(6, 1), nn.Linear(1, 3)

    def forward(self, x):
        h = self.narrow(x).squeeze()
        return self.wide(h[:, None])


class Branches(nn.Module):
    """Takes another branch for other values."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.up(x) if x.sum() > 0 else self.down(x)


class Clamp(torch.autograd.Function):
    """A function with a backward pass of its own and no rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.o = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.o(Clamp.apply(self.a(x) * self.scale))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.o = nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        h += 1
        h[:, 0] *= 2
        return self.o(h.relu_() * self.scale)


class Unused(nn.Module):
    """Has parameters that no output reads, and frozen ones."""

    def __init__(self):
        super().__init__()
        self.a, self.idle, self.lone = (
            nn.Linear(6, 3),
            nn.Linear(2, 2),
            nn.Parameter(torch.tensor(3.0)),
        )
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.a(x) * self.fixed


class MixesRarely(nn.Module):
    """Centres over the batch, but only where a value is larger than 4: random inputs hardly ever show it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        if bool((x.abs() > 4).any()):
            x = x - x.mean(0)
        return self.a(x)


def stacked(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


NUMBERS = {
    "scale": lambda: nn.Sequential(nn.Linear(6, 8), Scale(), nn.ReLU(), nn.Linear(8, 3), Scale()),
    "bilinear": Pairs,
    "squeezes": Squeezes,
    "branches": Branches,
    "custom": Custom,
    "in_place": InPlace,
    "unused": Unused,
    "conv1d": lambda: stacked(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU()),
    "conv3d": lambda: stacked(nn.Unflatten(1, (1, 3, 2, 1)), nn.Conv3d(1, 4, (2, 2, 1)), nn.ReLU()),
    "group": lambda: stacked(nn.Linear(6, 8), nn.GroupNorm(2, 8)),
    "rare": MixesRarely,
}
WORDS = {
    "embedding": Tokens,
    "padded": lambda: Tokens(padding_idx=0),
    "sparse": lambda: Tokens(sparse=True),
    "bag": Bag,
    "bag_max": lambda: Bag(mode="max"),
    "bag_sparse": lambda: Bag(sparse=True),
    "tied": Tied,
    "raw": Raw,
    "lstm": lambda: Tokens(nn.LSTM(8, 8, batch_first=True)),
    "gru": lambda: Tokens(nn.GRU(8, 8, batch_first=True)),
    "attention": lambda: Tokens(nn.MultiheadAttention(8, 2, batch_first=True)),
}


def make(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns the network `name`, inputs [5, 6] of its kind and labels."""
    torch.manual_seed(0)
    chance = torch.Generator().manual_seed(1)
    if name in WORDS:
        x = torch.randint(20, (5, 6), generator=chance).float()
        model = WORDS[name]()
    else:
        x = torch.randn(5, 6, generator=chance)
        model = NUMBERS[name]()
    with torch.no_grad():
        model(x)
    return model, x, torch.randint(3, (5,), generator=chance)
