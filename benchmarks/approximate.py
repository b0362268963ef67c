"""Width cut through layer norms and GRN: does fitting their scales keep accuracy, and do scores beat chance?

    python benchmarks/approximate.py --seeds 0 1 2 --out approximate.jsonl

A small ViT and a small ConvNeXt V2 learn handwritten digits and are cut to `--keep` of their parameters, the residual
stream included. Test accuracies in percent right after the cut, without any training, and how far the outputs are from
those of the uncut network (the norm of the difference, as a share).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress import compress, data
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.pipeline.recipe import load
from fedpress.training.evaluate import evaluate

RECIPE = """
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
validation = 200
[model]
architecture = "mlp"
[[stage]]
kind = "export"
"""
NORMS = ("layer_norm", "grn")


class Attention(nn.Module):
    """Self-attention with a fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, -1)
        )


class ViT(nn.Module):
    """A vision transformer with 16 patches of 2 x 2 pixels and a class token."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            parts = [nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width), mlp]
            self.blocks.append(nn.ModuleList(parts))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 8, 8] -> [n, 10]."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        for first, attention, second, mlp in self.blocks:
            x = x + attention(first(x))
            x = x + mlp(second(x))
        return self.head(self.norm(x)[:, 0])


class GRN(nn.Module):
    """Global response norm (Woo et al. 2023, section 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.zeros(1, 1, 1, width)),
            nn.Parameter(torch.zeros(1, 1, 1, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, h, w, width] -> the same."""
        lengths = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (
            self.gamma * (x * (lengths / (lengths.mean(-1, keepdim=True) + 1e-6))) + self.beta + x
        )


class Block(nn.Module):
    """A block of ConvNeXt V2: depthwise convolution, layer norm, two linear layers with GRN between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = (
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.LayerNorm(width),
        )
        self.up, self.grn, self.down = (
            nn.Linear(width, 4 * width),
            GRN(4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, h, w] -> the same."""
        y = self.down(self.grn(F.gelu(self.up(self.norm(self.deep(x).permute(0, 2, 3, 1))))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Three blocks at 4 x 4 places."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 8, 8] -> [n, 10]."""
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ViT": ViT, "ConvNeXt V2": ConvNeXt}


def trained(model: nn.Module, examples: FederatedData, epochs: int, seed: int) -> nn.Module:
    """Trains `model` on the public part with AdamW, which transformers need."""
    public, batch = examples.public, 64
    steps = epochs * (len(public) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    draw = public_stream(seed, "order")
    model.train()
    for _ in range(epochs):
        order = draw.permutation(len(public))
        for some in order[: len(order) // batch * batch].view(-1, batch):
            loss = F.cross_entropy(model(examples.preprocess(public.x[some])), public.y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def arms(
    dense: nn.Module, examples: FederatedData, name: str, keep: float, seed: int
) -> Iterator[tuple[str, nn.Module]]:
    """Yields the network cut by one score, before its norms are fitted and after."""
    public = examples.public.take(torch.arange(512))

    def losses() -> Iterator[Tensor]:
        for x, y in zip(public.x.split(256), public.y.split(256), strict=True):
            yield F.cross_entropy(dense(examples.preprocess(x)), y)

    graph = compress.trace(dense, examples.preprocess(public.x[:2]), approximate=NORMS)
    scores = compress.score(
        dense, graph, name, losses=losses, generator=public_stream(seed, "random")
    )
    plan = compress.plan(dense, graph, scores, keep_params=keep, scope="layer", round_to=1)
    small = copy.deepcopy(dense)
    compress.remove_(small, plan)
    compress.check_parity(dense, small, plan, examples.preprocess(public.x[:2]))
    yield "not fitted", copy.deepcopy(small)
    compress.refit_norms_(dense, small, plan, [examples.preprocess(x) for x in public.x.split(256)])
    yield "fitted", small


def run(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields one row for every seed, network, score and arm."""
    recipe = load(RECIPE)
    for seed in options.seeds:
        examples = data.load(recipe.data, derive(seed, "data"))
        shown = [examples.preprocess(examples.test.x)]
        for network, build in NETWORKS.items():
            torch.manual_seed(seed)
            dense = trained(build(), examples, options.train, seed)
            yield {
                "seed": seed,
                "network": network,
                "arm": "dense",
                "accuracy": share(dense, examples),
            }
            for score in ("l1", "taylor", "random"):
                for arm, small in arms(dense, examples, score, options.keep, seed):
                    yield {
                        "seed": seed,
                        "network": network,
                        "arm": f"{score}, {arm}",
                        "accuracy": share(small, examples),
                        "difference": 100
                        * compress.output_difference(dense, small, shown).relative,
                    }


def share(model: nn.Module, examples: FederatedData) -> float:
    """Returns the test accuracy in percent."""
    return 100 * evaluate(model, examples.test, examples.preprocess, examples.task).score


def table(rows: list[dict[str, object]]) -> str:
    """Returns mean and spread over the seeds, one line for each network and arm."""
    lines = ["| network | score, norms | accuracy | difference |", "| --- | --- | --- | --- |"]
    for network, arm in dict.fromkeys((row["network"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["network"], row["arm"]) == (network, arm)]
        cells = []
        for key in ("accuracy", "difference"):
            values = [float(str(row[key])) for row in own if key in row]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {network} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--train", type=int, default=30, help="epochs of the dense network")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with options.out.open("a") as file:
        for row in run(options):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
