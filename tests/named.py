"""Networks of several inputs and people to train them on, for the tests of examples that are dictionaries."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

WORDS, LONGEST, SENSORS = 20, 6, 3


class Notes(nn.Module):
    """Words up to a length, and sensors, to two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.read = nn.Linear(8, 16)
        self.feel = nn.Linear(SENSORS, 16)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens, lengths, sensors):
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        words = torch.relu(self.read(self.embed(tokens))) * inside[..., None]
        mean = words.sum(1) / lengths[:, None]
        return self.head(torch.cat([mean, torch.relu(self.feel(sensors))], 1))


class Price(Notes):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1)


class Packed(nn.Module):
    """Reads packed sequences: lengths decide which operations run, and 0 is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.read = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12 + SENSORS, 2)

    def forward(self, sensors, *, tokens, lengths):
        packed = pack_padded_sequence(
            self.embed(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.head(torch.cat([self.read(packed)[1][0], sensors], 1))


class Sums(nn.Module):
    """Two float inputs through layers that the ghost method knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, left, right):
        return self.head(torch.tanh(self.a(left) + self.b(right)))


class One(nn.Module):
    """One input by its name: a dictionary must change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(SENSORS, 12), nn.Tanh(), nn.Linear(12, 2))

    def forward(self, x):
        return self.net(x)


class Tags(nn.Module):
    """A class for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 2)

    def forward(self, tokens, lengths):
        return self.head(self.embed(tokens)).movedim(-1, 1)


def person(at: int, n: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns notes whose class shows in words and sensors; words behind the length say nothing."""
    chance = np.random.default_rng(at)
    y = chance.integers(0, 2, n)
    lengths = chance.integers(1, LONGEST + 1, n)
    words = chance.integers(0, WORDS // 2, (n, LONGEST)) + WORDS // 2 * y[:, None]
    behind = chance.integers(0, WORDS, (n, LONGEST))
    tokens = np.where(np.arange(LONGEST) < lengths[:, None], words, behind)
    sensors = chance.normal(size=(n, SENSORS)) + 0.5 * (2 * y[:, None] - 1)
    return {"tokens": tokens, "lengths": lengths, "sensors": sensors.astype(np.float32)}, y


def people():
    return {f"p{at}": person(at) for at in range(6)}


def tagged():
    """Notes whose targets are classes of positions, padded."""
    found = {}
    for name, (x, _) in people().items():
        tags = (x["tokens"] >= WORDS // 2).astype(np.int64)
        inside = np.arange(LONGEST) < x["lengths"][:, None]
        found[name] = ({k: x[k] for k in ("tokens", "lengths")}, np.where(inside, tags, -100))
    return found


def priced():
    """Notes with a number as target."""
    return {name: (x, x["sensors"].sum(1)) for name, (x, _) in people().items()}


def sensors_alone():
    return {name: (x["sensors"], y) for name, (x, y) in people().items()}


def sensors_by_name():
    return {name: ({"x": x["sensors"]}, y) for name, (x, y) in people().items()}


RECIPE = """
name = "notes"
seed = 3
[data]
source = "tests.named:{data}"
public_clients = ["p0", "p1"]
test_clients = ["p2"]
validation = 20
{more}
[model]
architecture = "tests.named:{model}"
"""

TRAIN = """
[[stage]]
kind = "train"
epochs = 3
batch_size = 16
lr = 0.2
"""

FEDERATE = """
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 16
lr = 0.2
{privacy}
"""


def recipe(*stages: str, data="people", model="Notes", more="") -> str:
    return RECIPE.format(data=data, model=model, more=more) + "".join(stages)


def federate(privacy="", **keys) -> str:
    more = "\n".join(f"{key} = {value}" for key, value in keys.items())
    return FEDERATE.format(privacy=privacy) + more + "\n"


class Bert(nn.Module):
    """A classifier of the transformers library, which is called by name and gives an object."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=LONGEST, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits


def masked():
    """Notes in the words of the transformers library."""
    found = {}
    for name, (x, y) in people().items():
        mask = np.arange(LONGEST) < x["lengths"][:, None]
        found[name] = ({"input_ids": x["tokens"], "attention_mask": mask.astype(np.int64)}, y)
    return found
