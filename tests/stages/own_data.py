"""Own data and networks of the tests of federate stages: clients that can, cannot, or can in part be trained."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

WORDS = 10


def words(**far: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns clients c0 to c5 whose class shows in their words; `far` moves a client's words out of the vocabulary."""
    clients = {}
    for i in range(6):
        chance = np.random.default_rng(i)
        y = chance.integers(0, 2, 40)
        x = chance.integers(0, WORDS // 2, (40, 6)) + WORDS // 2 * y[:, None]
        clients[f"c{i}"] = (x + far.get(f"c{i}", 0), y)
    return clients


def good():
    return words()


def some_bad():
    return words(c3=99, c4=99)


def all_bad():
    return words(**{f"c{i}": 99 for i in range(2, 6)})


def odd():
    """Clients whose last batch of 8 holds one example, beside others."""
    rows = {"c2": 33, "c3": 17, "c4": 40, "c5": 25}
    return {
        name: (x[: rows.get(name, 40)], y[: rows.get(name, 40)]) for name, (x, y) in words().items()
    }


def lone():
    """One client with a single example."""
    return {name: (x[:1], y[:1]) if name == "c3" else (x, y) for name, (x, y) in words().items()}


class Embeds(nn.Module):
    """Words to classes, with a temperature: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.heat = (
            nn.Embedding(WORDS, 8),
            nn.Linear(8, 2),
            nn.Parameter(torch.tensor(1.0)),
        )

    def forward(self, x):
        return self.heat * self.head(self.embed(x.long()).mean(1))


class Remembers(Embeds):
    """Counts its forward passes in a buffer, which private steps refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return super().forward(x)


class Breaks(Embeds):
    """Cannot be trained at all."""

    def forward(self, x):
        if self.training:
            raise RuntimeError("this network was never trained")
        return super().forward(x)


class Idle(Embeds):
    """Has no gradient."""

    def forward(self, x):
        return super().forward(x).detach() + 0 * self.heat


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


RECIPE = """
name = "t"
seed = 3
[data]
source = "tests.stages.own_data:{data}"
public_clients = ["c0"]
test_clients = ["c1"]
validation = 0
mean = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
std = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
{more}
[model]
architecture = "tests.stages.own_data:{model}"
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = {batch}
lr = {lr}
{stage}
"""


def recipe(data="good", model="Embeds", stage="", rounds=3, batch=20, lr=0.5, more="") -> str:
    return RECIPE.format(
        data=data, model=model, stage=stage, rounds=rounds, batch=batch, lr=lr, more=more
    )


def privacy(unit: str, trust: str, noise=0.3) -> str:
    return f'privacy = {{ unit = "{unit}", trust = "{trust}", noise_multiplier = {noise}, delta = 1e-3 }}'


class Squeezes(nn.Module):
    """Drops the batch dimension of a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).unsqueeze(2).squeeze())


class InPairs(Squeezes):
    """Fails on a batch of one."""

    def forward(self, x):
        if len(x) == 1:
            raise RuntimeError("one is too few")
        return super().forward(x)
