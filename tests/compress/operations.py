"""Operations between two layers, as people write them: what goes through each, and whether channels are cut there.

A row is (input, form, shape of a weight that the form takes last or None, what happens): "cut" when channels of the
first layer go, "whole" when the operation mixes them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS = {
    "vector": (2, 6),
    "tokens": (2, 5, 6),
    "series": (2, 3, 8),
    "image": (2, 3, 8, 8),
    "volume": (2, 2, 4, 4, 4),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "vector": lambda: nn.Linear(6, 16),
    "tokens": lambda: nn.Linear(6, 16),
    "series": lambda: nn.Conv1d(3, 16, 3, padding=1),
    "image": lambda: nn.Conv2d(3, 16, 3, padding=1),
    "volume": lambda: nn.Conv3d(2, 16, 3, padding=1),
}
Form = Callable[..., Any]
Row = tuple[str, Form, tuple[int, ...] | None, str]
TABLE: dict[str, Row] = {}


def row(
    name: str, kind: str, form: Form, weight: tuple[int, ...] | None = None, wanted: str = "cut"
) -> None:
    assert name not in TABLE
    TABLE[name] = (kind, form, weight, wanted)


def aliases() -> None:
    """Other names of operations with rules."""
    row("concat", "vector", lambda a, b: torch.concat([a, b], 1))
    row("concatenate", "vector", lambda a, b: torch.concatenate([a, b], 1))
    row("hstack", "image", lambda a, b: torch.hstack([a, b]))
    row("dstack", "image", lambda a, b: torch.dstack([a, b]))
    row("column_stack", "vector", lambda a, b: torch.column_stack([a, b]))
    row("multiply", "vector", lambda a, b: torch.multiply(a, b))
    row("divide", "vector", lambda a, b: torch.divide(a, b * b + 1))
    row("true_divide", "vector", lambda a, b: torch.true_divide(a, b * b + 1))
    row("subtract", "vector", lambda a, b: torch.subtract(a, b))
    row("negative", "vector", torch.negative)
    row("absolute", "vector", torch.absolute)
    row("absolute_", "vector", lambda a, b: (a * 2).absolute_() + b)
    row("arctan2", "vector", lambda a, b: torch.arctan2(a, b.abs() + 1))
    row("greater", "vector", lambda a, b: torch.greater(a, b) * a)
    row("fix", "vector", lambda a, b: torch.fix(a) + b)
    row("clip", "vector", lambda a, b: a.clip(-1, 1) + b)
    row("logsigmoid", "vector", lambda a, b: F.logsigmoid(a) + b)
    row("special", "vector", lambda a, b: torch.special.expit(a) + torch.special.log1p(b * b))
    row("threshold", "vector", lambda a, b: F.threshold(a, 0.1, 20) + F.threshold_(b * 1, 0.1, 0.0))
    row("where", "vector", lambda a, b: torch.where(a > 0, a, 0.1) + b)
    row("logical", "vector", lambda a, b: ((a > 0) & (b > 0)) * a)
    row(
        "broadcast_tensors",
        "image",
        lambda a, b: torch.broadcast_tensors(a.mean((2, 3), keepdim=True), b)[0],
    )
    row("expand_as", "image", lambda a, b: a.mean((2, 3), keepdim=True).expand_as(b))
    row("view_as", "image", lambda a, b: a.flatten(1).view_as(b))
    row("moveaxis", "image", lambda a, b: (a + b).moveaxis(1, -1))
    row("moveaxes", "image", lambda a, b: torch.moveaxis(a + b, (1, 3), (3, 1)))
    row("swapdims", "image", lambda a, b: (a + b).swapdims(1, -1))
    row("transpose_", "tokens", lambda a, b: (a + b).transpose_(1, 2))
    row("adjoint", "tokens", lambda a, b: (a + b).adjoint())
    row("tile", "image", lambda a, b: torch.tile(a + b, (1, 2, 1, 1)))
    row("tile short", "vector", lambda a, b: torch.tile(a + b, (3,)))
    row("hsplit", "image", lambda a, b: sum(torch.hsplit(a + b, 2)))
    row("hsplit at", "vector", lambda a, b: list(torch.hsplit(a + b, [4])))
    row("tensor_split", "image", lambda a, b: sum(torch.tensor_split(a + b, 2, 1)))
    row("tensor_split at", "vector", lambda a, b: list(torch.tensor_split(a + b, [4, 10], 1)))
    row(
        "tensor_split unequal",
        "vector",
        lambda a, b: list(torch.tensor_split(a + b, 3, 1)),
        None,
        "whole",
    )
    row("unsafe_chunk", "image", lambda a, b: sum(torch.unsafe_chunk(a + b, 2, 1)))
    row("flip", "image", lambda a, b: (a + b).flip(1))
    row("fliplr", "vector", lambda a, b: torch.fliplr(a + b))
    row("rot90", "image", lambda a, b: torch.rot90(a + b, 1, (2, 3)))
    row("kron", "vector", lambda a, b, w: torch.kron(a + b, w), (1, 2))
    row("convolution", "image", lambda a, b, w: torch.convolution(
        a + b, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1), (8, 16, 3, 3))  # fmt: skip
    row("other types", "image", lambda a, b: (a + b).double().float())


def along_space() -> None:
    """Operations along height and width, and along the axes of tokens."""
    size = lambda a: (a.shape[0], 1, 5, 5)  # noqa: E731
    turn = lambda a, n=2: torch.eye(n, n + 1)[None].repeat(a.shape[0], 1, 1)  # noqa: E731
    row("trilinear", "volume", lambda a, b: F.interpolate(a + b, scale_factor=2, mode="trilinear"))
    row("nearest 3d", "volume", lambda a, b: F.interpolate(a + b, scale_factor=2))
    row("nearest-exact", "image", lambda a, b: F.interpolate(a + b, size=5, mode="nearest-exact"))
    row(
        "antialias",
        "image",
        lambda a, b: F.interpolate(a + b, size=5, mode="bicubic", antialias=True),
    )
    row(
        "unpool",
        "image",
        lambda a, b: F.max_unpool2d(*F.max_pool2d(a + b, 2, return_indices=True), 2),
    )
    row("adaptive max 3d", "volume", lambda a, b: F.adaptive_max_pool3d(a + b, 2))
    row("lp pool", "image", lambda a, b: F.lp_pool2d(a + b, 2, 2))
    row("circular", "image", lambda a, b: F.pad(a + b, (1, 1, 1, 1), mode="circular"))
    row("reflect 3d", "volume", lambda a, b: F.pad(a + b, (1,) * 6, mode="reflect"))
    row("affine_grid", "image", lambda a, b: F.grid_sample(
        a + b, F.affine_grid(turn(a), size(a), align_corners=False), align_corners=False))  # fmt: skip
    row("affine_grid 3d", "volume", lambda a, b: F.grid_sample(
        a + b, F.affine_grid(turn(a, 3), a.size(), align_corners=True), align_corners=True))  # fmt: skip
    row("spatial transformer", "image", lambda a, b, w: F.grid_sample(
        b, F.affine_grid(F.linear(a.mean((2, 3)), w).unflatten(1, (2, 3)), b.size(), align_corners=False),
        align_corners=False), (6, 16))  # fmt: skip
    row("deformed", "image", lambda a, b: F.grid_sample(
        a, b[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False))  # fmt: skip
    row("unfold", "image", lambda a, b: F.unfold(a + b, 3))
    row("unfold blocks", "image", lambda a, b: F.unfold(a + b, 3, padding=1).view(
        a.shape[0], a.shape[1], 9, 8, 8).softmax(2))  # fmt: skip
    row(
        "unfold linear",
        "image",
        lambda a, b, w: F.linear(F.unfold(a + b, 3).transpose(1, 2), w),
        (7, 16 * 9),
    )
    row(
        "unfold kernel",
        "image",
        lambda a, b, w: w.flatten(1) @ F.unfold(a + b, 3, padding=1),
        (7, 16, 3, 3),
    )
    row(
        "fold",
        "image",
        lambda a, b: F.fold(F.unfold(a + b, 2, stride=2).relu(), (8, 8), 2, stride=2),
    )
    row("windows", "image", lambda a, b: (a + b).unfold(2, 3, 1).unfold(3, 3, 1))
    row("windows over channels", "image", lambda a, b: (a + b).unfold(1, 2, 2), None, "whole")
    row("fft space", "image", lambda a, b: torch.fft.irfft2(torch.fft.rfft2(a + b) * 0.5, s=(8, 8)))
    row("fft tokens", "tokens", lambda a, b: torch.fft.fft(a + b, dim=1).real)
    row(
        "fft shift",
        "image",
        lambda a, b: torch.fft.fftshift(torch.fft.fft2(a + b), dim=(2, 3)).abs(),
    )
    row("fft filter", "image", lambda a, b, w: torch.fft.irfft2(
        torch.fft.rfft2(a + b, norm="ortho") * torch.view_as_complex(w), s=(8, 8), norm="ortho"),
        (16, 8, 5, 2))  # fmt: skip
    row("fourier operator", "image", lambda a, b, w: torch.fft.irfft2(torch.einsum(
        "bixy,ioxy->boxy", torch.fft.rfft2(a + b), torch.view_as_complex(w)), s=(8, 8)), (16, 12, 8, 5, 2))  # fmt: skip
    row("fft channels", "tokens", lambda a, b: torch.fft.fft2(a + b).real, None, "whole")
    row("cumulative", "image", lambda a, b: (a + b).cummax(2)[0] + (a + b).logcumsumexp(3))
    row("sorted", "image", lambda a, b: (a + b).sort(2)[0] + (a + b).topk(8, dim=3)[0])
    row("sorted channels", "image", lambda a, b: (a + b).sort(1)[0], None, "whole")
    row("median", "image", lambda a, b: (a + b).median(2)[0] + (a + b).quantile(0.5, dim=3))
    row("diff", "image", lambda a, b: (a + b).diff(dim=2))
    row("diff channels", "image", lambda a, b: (a + b).diff(dim=1), None, "whole")
    row("taken", "tokens", lambda a, b: torch.take_along_dim(a + b, (a + b).mean(2, keepdim=True).argsort(1), 1),
        None, "whole")  # fmt: skip
    row("gathered", "tokens", lambda a, b: (a + b).gather(
        1, torch.zeros(2, 1, 1, dtype=torch.long).expand(2, 1, a.shape[-1])))  # fmt: skip
    row("one hot", "tokens", lambda a, b: F.one_hot((a + b).argmax(1), 5).float())
    row("inverse", "image", lambda a, b: torch.linalg.inv((a + b) @ (a + b).mT + torch.eye(8)))
    row("diagonal", "image", lambda a, b: torch.diagonal(a + b, dim1=2, dim2=3))


def products() -> None:
    """Products with weights, whichever way round, and of activations."""
    row(
        "bag",
        "vector",
        lambda a, b, w: a + b + F.embedding_bag(torch.tensor([[1, 2], [0, 3]]), w),
        (5, 16),
    )
    row("bag of offsets", "vector", lambda a, b, w: a + b + F.embedding_bag(
        torch.tensor([1, 2, 0, 3]), w, torch.tensor([0, 2]), mode="sum"), (5, 16))  # fmt: skip
    row("largest of a bag", "vector", lambda a, b, w: a + b + F.embedding_bag(
        torch.tensor([[1, 2], [0, 3]]), w, mode="max"), (5, 16))  # fmt: skip
    row("bilinear", "vector", lambda a, b, w: F.bilinear(a, b, w), (12, 16, 16))
    row("bilinear tokens", "tokens", lambda a, b, w: F.bilinear(a, b, w), (12, 16, 16))
    row("cosine over tokens", "tokens", lambda a, b: F.cosine_similarity(a, b, dim=1))
    row(
        "cosine over channels",
        "image",
        lambda a, b: F.cosine_similarity(a, b, dim=1),
        None,
        "whole",
    )
    row("distance", "tokens", lambda a, b: torch.cdist(a, b), None, "whole")
    row("mv", "vector", lambda a, b, w: torch.mv(a + b, w), (16,))
    row("matvec", "tokens", lambda a, b, w: (a + b) @ w, (16,))
    row("dot", "vector", lambda a, b, w: (a + b) * torch.dot(w, w), (16,))
    row("weights first", "series", lambda a, b, w: w @ (a + b), (7, 16))
    row("tensordot", "tokens", lambda a, b, w: torch.tensordot(a + b, w, dims=([2], [1])), (7, 16))
    row("inner", "vector", lambda a, b, w: torch.inner(a + b, w), (7, 16))
    row("chain", "vector", lambda a, b, w: torch.linalg.multi_dot([a + b, w, w]), (16, 16))
    row("ellipsis", "tokens", lambda a, b, w: torch.einsum("...c,co->...o", a + b, w), (16, 7))
    row(
        "ellipsis last", "image", lambda a, b, w: torch.einsum("nc...,oc->no...", a + b, w), (7, 16)
    )
    row("implicit", "tokens", lambda a, b, w: torch.einsum("...c,co", a + b, w), (16, 7))
    row(
        "letters as numbers",
        "tokens",
        lambda a, b, w: torch.einsum(a + b, [0, 1, 2], w, [2, 3], [0, 1, 3]),
        (16, 7),
    )
    row("turned", "tokens", lambda a, b: torch.einsum("...ij->...ji", a + b))
    row(
        "pairs of tokens",
        "tokens",
        lambda a, b: torch.einsum("...ic,...jc->...ij", a, b),
        None,
        "whole",
    )
    row(
        "three factors",
        "tokens",
        lambda a, b, w: torch.einsum("nlc,nmc,o->nlmo", a, b, w),
        (3,),
        "whole",
    )
    row("heads", "tokens", lambda a, b: torch.einsum("...ihd,...jhd->...hij", *(
        x.unflatten(-1, (4, -1)) for x in (a, b))))  # fmt: skip


def rounding() -> None:
    """What a network that was trained for few bits does to its values."""
    row(
        "fake quantize",
        "vector",
        lambda a, b: torch.fake_quantize_per_tensor_affine(a + b, 0.02, 128, 0, 255),
    )
    row(
        "fake quantize channels",
        "image",
        lambda a, b, w: torch.fake_quantize_per_channel_affine(
            a + b, w.detach().abs() + 0.05, torch.zeros(16, dtype=torch.int32), 1, -128, 127
        ),
        (16,),
    )


def experts() -> None:
    """Mixtures of experts: stacked weights [experts, in, out] as they are multiplied."""
    row("experts bmm", "tokens", lambda a, b, w: torch.bmm(
        (a + b).flatten(0, 1).expand(3, 10, a.shape[-1]), w).sum(0), (3, 16, 8))  # fmt: skip
    row("experts matmul", "tokens", lambda a, b, w: (a + b)[:, None] @ w, (3, 16, 8))
    row(
        "experts einsum",
        "tokens",
        lambda a, b, w: torch.einsum("nlc,eco->nleo", a + b, w),
        (3, 16, 8),
    )
    row(
        "experts by number",
        "tokens",
        lambda a, b, w: sum((a + b) @ w[i] for i in range(3)),
        (3, 16, 8),
    )
    row("chosen experts", "tokens", lambda a, b, w: torch.bmm(
        w[torch.arange(10) % 3], (a + b).flatten(0, 1)[..., None]), (3, 8, 16))  # fmt: skip
    row("chosen by einsum", "tokens", lambda a, b, w: torch.einsum(
        "nlc,nlco->nlo", a + b, w[torch.arange(10).view(2, 5) % 3]), (3, 16, 8))  # fmt: skip


for part in (aliases, along_space, products, experts, rounding):
    part()


class Branch(nn.Module):
    """Two layers, the operation, and a layer that reads what it gives."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, self.form, weight, _ = TABLE[name]
        self.a, self.b = LAYERS[kind](), LAYERS[kind]()
        self.weight = nn.Parameter(torch.randn(weight)) if weight is not None else None
        self.count = self.form.__code__.co_argcount if hasattr(self.form, "__code__") else 1
        with torch.no_grad():
            self.head = nn.Linear(self.between(torch.zeros(INPUTS[kind])).shape[1], 3)

    def between(self, x: Tensor) -> Tensor:
        given = (
            (self.a(x), self.b(x), self.weight)[: self.count]
            if self.count > 1
            else (self.a(x) + self.b(x),)
        )
        found = self.form(*given)
        parts = [
            (torch.view_as_real(part) if part.is_complex() else part).float()
            for part in (found if isinstance(found, list | tuple) else [found])
        ]
        return torch.cat(
            [part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts], 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(x))


class Branches(nn.Module):
    """A branch for each of some rows: one network, so that one capture sees them all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.kinds = [TABLE[name][0] for name in names]
        self.parts = nn.ModuleDict({name: Branch(name) for name in names})

    def forward(
        self, vector: Tensor, tokens: Tensor, series: Tensor, image: Tensor, volume: Tensor
    ) -> list[Tensor]:
        given = {
            "vector": vector,
            "tokens": tokens,
            "series": series,
            "image": image,
            "volume": volume,
        }
        return [
            part(given[kind]) for kind, part in zip(self.kinds, self.parts.values(), strict=True)
        ]
