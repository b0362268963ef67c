"""Every task goes every way: trained, cut, distilled, quantized, federated, exported, predicted."""

import json
import sys
import tomllib
import types

import numpy as np
import pytest
import torch
from torch import nn

import fedpress
from fedpress import tasks
from fedpress.core import consent
from tests.harness import finish

WAYS = """
name = "ways"
seed = 3
[data]
source = "made_up_ways:{kind}"
task = {task}
public_share = 0.5
test_share = 0.2
[model]
architecture = "made_up_ways:{network}"
arguments = {{ outputs = {outputs} }}
[[stage]]
kind = "train"
epochs = {epochs}
batch_size = 16
optimizer = "adamw"
lr = 0.01
[[stage]]
kind = "prune"
keep_params = 0.7
score = "taylor"
round_to = 1
[[stage]]
kind = "train"
name = "distil"
epochs = 2
batch_size = 16
optimizer = "adamw"
lr = 0.003
teacher = "dense"
[[stage]]
kind = "quantize"
epochs = 0
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 16
lr = 0.005
{privacy}
[[stage]]
kind = "export"
format = "onnx"
"""
PRIVACY = {
    "open": "",
    "sample": 'privacy = { unit = "sample", epsilon = 8.0, delta = 1e-3, clip_norm = 1.0 }',
    "client": 'privacy = { unit = "client", epsilon = 8.0, delta = 1e-2, clip_norm = 0.1 }',
}
VOCABULARY = 8


class Rows(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Linear(24, outputs)

    def forward(self, x):
        return self.head(self.body(x))


class Letters(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.ReLU())
        self.head = nn.Linear(24, outputs)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens))).transpose(1, 2)


class Pixels(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(12, outputs, 1)

    def forward(self, x):
        return self.head(self.body(x))


def rows(kind, chance):
    x = chance.normal(size=(120, 4)).astype(np.float32)
    found = x @ np.array([[2, -1, 0.5, 0], [0, 1, 1, -2], [1, 1, -1, 0]]).T
    now = 50 + 10 * x[:, :1]
    y = {
        "classification": found.argmax(1),
        "binary": (found[:, 0] > 0).astype(int),
        "multilabel": found > 0,
        "regression": 50 + 10 * found[:, 0],
        "poisson": np.floor(np.exp(0.4 * found[:, 0])),
        # The value now, and two later ones that move away from it.
        "forecast": np.concatenate([now, now + 8 * found[:, :2]], 1),
        # Months, of which every third is where the person was last seen.
        "survival": np.stack([12 * np.exp(-0.7 * found[:, 0]), np.arange(120) % 3 > 0], 1),
    }[kind]
    return x, y


def letters(kind, chance):
    # The next token is three further, so that one token is enough to know it.
    start = chance.integers(0, VOCABULARY, (120, 1))
    tokens = (start + 3 * np.arange(6)) % VOCABULARY
    following = (tokens + 3) % VOCABULARY
    following[::3, 4:] = -100
    return {"tokens": tokens}, following


def pixels(kind, chance):
    images = chance.integers(0, 100, (120, 1, 6, 6))
    masks = np.zeros((120, 6, 6), dtype=np.int64)
    masks[:, :3, :3] = 1 + (np.arange(120) % 2)[:, None, None]
    images[:, 0] += 70 * masks
    return images.astype(np.uint8), masks


# Task -> network, outputs, data, and whether a value is better than a guess.
CASES = {
    "classification": ("Rows", 3, rows, lambda line: line["accuracy"] > 0.7),
    "binary": ("Rows", 1, rows, lambda line: line["auc"] > 0.8),
    "multilabel": ("Rows", 3, rows, lambda line: line["macro_f1"] > 0.7),
    "regression": ("Rows", 1, rows, lambda line: line["mae"] < 0.6 * line["mae_of_mean"]),
    "poisson": ("Rows", 1, rows, lambda line: line["deviance"] < 0.9 * line["deviance_of_mean"]),
    "forecast": ("Rows", 2, rows, lambda line: line["skill"] > 0.3),
    "language": ("Letters", VOCABULARY, letters, lambda line: line["perplexity"] < 3),
    "segmentation": ("Pixels", 3, pixels, lambda line: line["mean_iou"] > 0.5),
    "survival": ("Rows", 4, rows, lambda line: line["brier"] < 0.8 * line["brier_of_everyone"]),
}
OPTIONS = {
    "forecast": '{ kind = "forecast", now = true }',
    "survival": '{ kind = "survival", intervals = 4 }',
}


def test_every_task_has_a_case():
    assert CASES.keys() == tasks.TASKS.keys()


@pytest.fixture
def module(monkeypatch):
    """A module with the networks, and a data function for each task: three clients."""
    made = types.ModuleType("made_up_ways")
    made.Rows, made.Letters, made.Pixels = Rows, Letters, Pixels
    for kind, (_, _, data, _) in CASES.items():
        clients = {f"c{at}": data(kind, np.random.default_rng(at)) for at in range(3)}
        setattr(made, kind, lambda clients=clients: clients)
    monkeypatch.setitem(sys.modules, "made_up_ways", made)
    consent.allow(*(f"made_up_ways:{name}" for name in ("Rows", "Letters", "Pixels")))
    return made


@pytest.mark.recipe
@pytest.mark.parametrize("privacy", PRIVACY)
@pytest.mark.parametrize("kind", CASES)
def test_every_task_goes_every_way(kind, privacy, module, tmp_path):
    network, outputs, _, learned = CASES[kind]
    text = WAYS.format(
        kind=kind,
        task=OPTIONS.get(kind, f'"{kind}"'),
        network=network,
        outputs=outputs,
        privacy=PRIVACY[privacy],
        epochs=15,
    )
    result = finish(text, tmp_path / "run")
    lines = {line["name"]: line for line in result["stages"]}
    for name in ("train", "distil"):
        assert lines[name]["task"] == kind
        assert learned(lines[name]), name
    assert lines["prune"]["parity_error"] < 1e-5
    assert lines["prune"]["parameters"] < lines["train"]["parameters"]
    primary = tasks.TASKS[kind].primary
    federated, exported = lines["federate"], lines["export"]
    assert exported[primary] == pytest.approx(federated[primary], rel=0.1, abs=0.05)
    # What the model is worth on a client's own examples is a private number.
    assert bool(federated.get(f"client_{primary}")) is (privacy == "open")
    if privacy != "open":
        assert federated["epsilon"] <= 8
    page = fedpress.report(tmp_path / "run")
    assert tasks.TASKS[kind].shown_metrics[0].name in page.read_text()

    x, _ = getattr(module, kind)()["c0"]
    few = {name: part[:5] for name, part in x.items()} if isinstance(x, dict) else x[:5]
    of_run = fedpress.predict(tmp_path / "run", few)
    of_file = fedpress.predict(tmp_path / "run" / "artifacts" / "model.onnx", few)
    assert of_run.task == of_file.task == kind
    assert of_run.answers.shape == of_file.answers.shape
    assert len(of_run) == 5
    assert not bool(of_run.answers.isnan().any())
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert primary in told["final"]


@pytest.mark.recipe
@pytest.mark.parametrize("kind", CASES)
def test_every_task_is_trained_and_measured_by_its_name_in_python(kind, module):
    network, outputs, data, learned = CASES[kind]
    x, y = data(kind, np.random.default_rng(0))
    if not isinstance(x, dict):
        x = torch.from_numpy(x)
    named = tomllib.loads(f"task = {OPTIONS[kind]}")["task"] if kind in OPTIONS else kind
    y = torch.from_numpy(y.astype(np.float32 if tasks.TASKS[kind].targets != "classes" else int))
    torch.manual_seed(0)
    done = fedpress.train(
        getattr(module, network)(outputs), data=(x, y), task=named, epochs=40, batch_size=16,
        optimizer="adamw", lr=0.01,
    )  # fmt: skip
    assert learned(done.after)
    # The task stays with the model: a second call needs no name.
    again = fedpress.quantize(done, data=(x, y), epochs=0)
    assert again.after["task"] == kind
