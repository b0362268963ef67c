"""Small networks of every shape that the channel rules must get right, with their inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, padding="same"), nn.BatchNorm2d(16)
        self.b, self.nb = nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.na(self.a(x)), inplace=True), 2)
        return self.head(F.adaptive_avg_pool2d(F.silu(self.nb(self.b(x))), 1).flatten(1))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16 * 36, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.a(x))
        return self.head(F.gelu(self.b(x.view(x.shape[0], -1))))


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.nb = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = shortcut
        if i != o and shortcut == "project":
            self.project = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        if hasattr(self, "project"):
            x = self.project(x)
        elif x.shape != y.shape:
            half = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return F.relu(x + y)


class Residual(nn.Module):
    def __init__(self, shortcut: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1, shortcut), Block(16, 32, 2, shortcut), Block(32, 32, 1, shortcut))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(32, 16, 3, 1, 1)
        self.norm, self.head = nn.BatchNorm2d(48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        x = torch.cat([x, self.c(x)], 1)
        return self.head(F.hardswish(self.norm(x)).amax((2, 3)))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.d, self.nd = nn.Conv2d(16, 32, 3, 1, 1, groups=16), nn.BatchNorm2d(32)  # two outputs per input
        self.p, self.head = nn.Conv2d(32, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.nd(self.d(F.relu6(self.na(self.a(x))))))
        return self.head(F.avg_pool2d(self.p(x), 4).squeeze(3).squeeze(2))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.h = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 16, 1, groups=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.a(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.h(x)).mean((2, 3)))


class Gated(nn.Module):
    """Chunks (GLU), a squeeze-and-excite gate, and group normalisation of which only whole groups can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3), nn.Conv2d(16, 24, 3)
        self.down, self.up = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 24, 1)
        self.c, self.norm, self.head = nn.Conv2d(24, 32, 1), nn.GroupNorm(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.a(x).chunk(2, 1)
        x = self.b(x * gate.sigmoid())
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.norm(self.c(x))).mean((2, 3)))


class Waves(nn.Module):
    """A one-dimensional network with a permutation, a per-channel buffer, a slope per channel and shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.slope = nn.Conv1d(3, 16, 5), nn.PReLU(16)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 16).view(16, 1))
        self.one = nn.Linear(16, 16)
        self.two = nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.slope(self.a(x)) * self.gain).permute(0, 2, 1)
        return self.head(torch.tanh(self.two(F.relu(self.one(x)))).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5)
    )


IMAGE = (2, 3, 8, 8)
ZOO = {
    "plain": (Plain, IMAGE),
    "flat": (Flat, IMAGE),
    "residual": (lambda: Residual("project"), IMAGE),
    "padded": (lambda: Residual("pad"), IMAGE),
    "dense": (Dense, IMAGE),
    "separable": (Separable, IMAGE),
    "shuffle": (Shuffle, IMAGE),
    "gated": (Gated, IMAGE),
    "waves": (Waves, (2, 3, 20)),
    "mlp": (mlp, (2, 3, 4)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Returns the network with random statistics and affine numbers, so that nothing is zero or one by luck."""
    build, shape = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model, torch.randn(shape)
