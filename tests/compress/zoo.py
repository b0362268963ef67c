"""Small networks of every shape that the channel rules must get right, with their inputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


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
        self.blocks = nn.Sequential(
            Block(16, 16, 1, shortcut), Block(16, 32, 2, shortcut), Block(32, 32, 1, shortcut)
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Conv2d(32, 16, 3, 1, 1),
        )
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
        self.d, self.nd = (
            nn.Conv2d(16, 32, 3, 1, 1, groups=16),
            nn.BatchNorm2d(32),
        )  # two outputs per input
        self.p, self.head = nn.Conv2d(32, 24, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.nd(self.d(F.relu6(self.na(self.a(x))))))
        return self.head(F.avg_pool2d(self.p(x), 4).squeeze(3).squeeze(2))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.h = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 32, 3, groups=2),
            nn.Conv2d(32, 16, 1, groups=2),
        )
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
        nn.Flatten(),
        nn.Linear(12, 32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 5),
    )


class Inverted(nn.Module):
    """Inverted residuals of MobileNetV2: wide inside, depthwise in the middle, narrow and linear at the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.one, self.two, self.three = self.block(8, 12), self.block(12, 12), self.block(12, 16)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 5)
        )

    def block(self, i: int, o: int) -> nn.Module:
        wide = nn.Sequential(nn.Conv2d(i, 4 * i, 1, bias=False), nn.BatchNorm2d(4 * i), nn.ReLU6())
        deep = nn.Sequential(
            nn.Conv2d(4 * i, 4 * i, 3, padding=1, groups=4 * i, bias=False),
            nn.BatchNorm2d(4 * i),
            nn.Hardswish(),
        )
        return nn.Sequential(wide, deep, nn.Conv2d(4 * i, o, 1, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(x))
        return self.head(self.three(x + self.two(x)))


class Parts(nn.Module):
    """Channels cut by numbers: literals, attributes, slices with and without ends, equal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.width = (6, 10), 12
        self.a, self.na, self.b = (
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.BatchNorm2d(16),
            nn.Conv2d(12, 16, 3, 1, 1),
        )
        self.c, self.d, self.e = nn.Conv2d(6, 12, 1), nn.Conv2d(10, 12, 1), nn.Conv2d(12, 24, 1)
        self.f, self.head = nn.Conv2d(8, 16, 1), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        early, late = x.split([4, 12], dim=1)
        x = torch.cat([F.relu(self.b(late)), early], 1)  # 20
        one, two = torch.split(x[:, :-4], split_size_or_sections=self.sizes, dim=1)
        y = F.relu(self.c(one) + self.d(two))[:, : self.width]
        first, second, third = self.e(y).split(8, 1)
        y = self.f(first * second.sigmoid() + third)
        y = torch.cat([y.narrow(1, 4, 12), y[:, :2], y[:, 2:4], x[:, -4:] if self.width else x], 1)
        return self.head(y.mean((2, 3)))


class Halves(nn.Module):
    """Sizes that follow the tensors: halves by division, every second channel, a shuffle as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.b, self.nb, self.c = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.Conv2d(16, 16, 1)
        self.d, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.na(self.a(x)))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.nb(self.b(right)))], 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        x = self.c(x)
        x = x[:, ::2] * torch.sigmoid(x[:, 1::2])
        return self.head(F.channel_shuffle(F.relu(self.d(x)), 4).mean((2, 3)))


class Attention(nn.Module):
    """Attention as people write it: a fused projection, or three; torch's function, matrix products or letters."""

    def __init__(self, width: int, heads: int, how: str) -> None:
        super().__init__()
        self.num_heads, self.how, self.scale = heads, how, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=how != "products")
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        if how in ("fused", "chunks"):
            del self.q, self.k, self.v
        else:
            del self.qkv
        self.proj = nn.Linear(width, width)
        if how == "products":
            self.bias = nn.Parameter(torch.randn(7, heads))
            self.register_buffer("index", torch.arange(16 * 16).view(16, 16) % 7)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        if self.how == "fused":
            shape = (n, length, 3, self.num_heads, width // self.num_heads)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "chunks":
            split = (n, length, self.num_heads, width // self.num_heads)
            q, k, v = (part.view(split).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "letters":
            q, k, v = (
                layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v)
            )
            weights = torch.softmax(torch.einsum("nihd,njhd->nhij", q, k) * self.scale, -1)
            return self.proj(torch.einsum("nhij,njhd->nihd", weights, v).flatten(2))
        else:
            q, k, v = (
                layer(x).view(n, length, 4, width // 4) for layer in (self.q, self.k, self.v)
            )
            q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
            scores = q @ k.transpose(-2, -1) / 8**0.5 + self.bias[self.index].permute(2, 0, 1)
            y = torch.matmul(scores.softmax(dim=-1), v)
        return self.proj(y.transpose(1, 2).reshape(n, length, width))


class Torch(nn.Module):
    """torch's own attention, in its general form."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class ViT(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 24, 2, 2), nn.Parameter(torch.randn(1, 16, 24))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            attention = Torch(24, 4) if how == "torch" else Attention(24, 4, how)
            mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
            self.blocks.append(nn.ModuleList([nn.LayerNorm(24), attention, mlp]))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for norm, attention, mlp in self.blocks:
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.head(self.norm(x).mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.place = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 9, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.words(x) + self.place)[:, 0])


class Words(nn.Module):
    """A small language model whose output layer is the table of its input; its stream has no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 24), nn.Linear(24, 11, bias=False)
        self.out.weight = self.words.weight
        self.a, self.b, self.attend = (
            nn.Linear(24, 32),
            nn.Linear(32, 24),
            Attention(24, 4, "chunks"),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = x + self.b(F.gelu(self.a(x)))
        return self.out(x + self.attend(x))[:, -1]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], layers: int, both: bool) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 12, 3)
        self.rnn = kind(12, 16, layers, bidirectional=both, batch_first=True)
        self.head = nn.Linear(32 if both else 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(F.relu(self.a(x)).transpose(1, 2))
        return self.head(out[:, -1])


class Steps(nn.Module):
    """A cell that the user's own loop drives, from a state of the user's own size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gate, self.head = nn.LSTMCell(3, 16), nn.GRUCell(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g = (
            torch.zeros(x.shape[0], 16),
            x.new_zeros(x.size(0), 16),
            torch.zeros(x.shape[0], 12),
        )
        for t in range(4):
            h, c = self.cell(x[:, :, t], (h, c))
            g = self.gate(h, g)
        return self.head(g)


class UNet(nn.Module):
    """Transposed convolutions, plain, grouped and depthwise, a skip, pixels made of channels and back; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.up, self.mix = (
            nn.ConvTranspose2d(24, 16, 2, 2),
            nn.ConvTranspose2d(32, 16, 3, 1, 1, groups=2),
        )
        self.deep, self.wide = nn.ConvTranspose2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1)
        self.back, self.head, self.tell = (
            nn.Conv2d(8, 12, 3, 2),
            nn.Conv2d(12, 3, 1),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = F.relu(self.a(x))
        y = F.relu(self.b(x))
        z = self.deep(F.relu(self.mix(torch.cat([x, self.up(y)], 1))))
        z = self.back(F.pixel_shuffle(F.relu(self.wide(z)), 2))
        return self.tell(y.mean((2, 3))), {"image": self.head(z)}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Linear(4, 16), nn.Linear(22, 16)
        self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        x = F.relu(self.a(image)).mean((2, 3))
        y = torch.tanh(self.b(numbers)) * torch.sigmoid(self.gate(x))
        return self.head(F.relu(self.c(torch.cat([x + y, numbers, numbers[:, :2]], 1))))


class Normed(nn.Module):
    """Weights as length times direction, and gated linear units."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a, self.b = norm(nn.Conv1d(3, 16, 3)), norm(nn.Conv1d(8, 16, 3, groups=2))
        self.d, self.glu = norm(nn.Conv1d(16, 16, 3, groups=16)), nn.GLU(1)
        self.c, self.head = norm(nn.Linear(16, 24)), norm(nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.d(F.relu(self.b(self.glu(self.a(x))))))
        return self.head(F.relu(self.c(x.mean(2))))


class Classic(nn.Module):
    """The ResNet for CIFAR-10 of 6n+2 layers: shortcuts are subsampled and padded with zeros by a fixed number."""

    def __init__(self, blocks: int = 1, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        steps, i = [], width
        for stage in range(3):
            for block in range(blocks):
                o, stride = width << stage, 2 if stage and not block else 1
                steps.append(Padded(i, o, stride))
                i = o
        self.steps, self.head = nn.Sequential(*steps), nn.Linear(i, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps(F.relu(self.norm(self.stem(x))))
        return self.head(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))


class Padded(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.nb = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = (
            (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, o // 4, o // 4))) if i != o else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


IMAGE, SERIES = (2, 3, 8, 8), (2, 3, 10)
ZOO = {
    "plain": (Plain, IMAGE),
    "flat": (Flat, IMAGE),
    "residual": (lambda: Residual("project"), IMAGE),
    "padded": (lambda: Residual("pad"), IMAGE),
    "classic": (Classic, IMAGE),
    "dense": (Dense, IMAGE),
    "separable": (Separable, IMAGE),
    "inverted": (Inverted, IMAGE),
    "shuffle": (Shuffle, IMAGE),
    "halves": (Halves, IMAGE),
    "parts": (Parts, IMAGE),
    "gated": (Gated, IMAGE),
    "unet": (UNet, IMAGE),
    "waves": (Waves, (2, 3, 20)),
    "normed": (Normed, SERIES),
    "mlp": (mlp, (2, 3, 4)),
    "vit-torch": (lambda: ViT("torch"), IMAGE),
    "vit-fused": (lambda: ViT("fused"), IMAGE),
    "vit-products": (lambda: ViT("products"), IMAGE),
    "vit-letters": (lambda: ViT("letters"), IMAGE),
    "encoder": (Encoder, 9),
    "words": (Words, 6),
    "lstm": (lambda: Recurrent(nn.LSTM, 1, False), (2, 3, 6)),
    "lstm-deep": (lambda: Recurrent(nn.LSTM, 2, True), (2, 3, 6)),
    "gru": (lambda: Recurrent(nn.GRU, 2, False), (2, 3, 6)),
    "steps": (Steps, (2, 3, 4)),
    "two-inputs": (TwoInputs, (IMAGE, (2, 4))),
}


def example(shape: Any, seed: int = 0) -> Any:
    """Draws numbers of a shape (or of several), or words, if the shape is just a length."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(shape, int):
        return torch.randint(11, (2, shape), generator=draw)
    if isinstance(shape[0], tuple):
        return tuple(example(each, seed) for each in shape)
    return torch.randn(shape, generator=draw)


def make(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """Returns the network with random statistics and affine numbers, so that nothing is zero or one by luck."""
    build, shape = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model, example(shape, seed)


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """Returns all the tensors that the network gives for an example of one or several inputs."""
    return tree_leaves(model(*x) if isinstance(x, tuple) else model(x))


def repeated(x: Any, times: int) -> Any:
    """Returns the example several times over, as one batch."""
    return (
        tuple(repeated(each, times) for each in x)
        if isinstance(x, tuple)
        else torch.cat([x] * times)
    )
