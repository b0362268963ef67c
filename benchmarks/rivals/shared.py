"""What all simulators of `benchmarks/simulation.py` share: task, network, data, evaluation, clock.

This file needs only torch and numpy, because each simulator runs in an environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of CIFAR-10's training images, for each channel, as shares of 255.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Task:
    """One run of one simulator, as `benchmarks/simulation.py` describes it in a JSON file.

    Attributes:
        folder: folder of the arrays that `load` reads.
        out: file that `Clock.write` writes.
        rounds: number of rounds.
        cohort: number of clients in a round.
        batch: number of images in a step.
        lr: learning rate of the clients; they take one epoch of SGD.
        engine: how the simulator uses the machine's cores.
        precision: "float32" or "bf16".
        extra: more settings of a federate stage of fedpress.
        threads: number of cores to use.
        seed: seed of everything random.
        launched: `time.time()` before the process was started.
    """

    folder: str
    out: str
    rounds: int
    cohort: int
    batch: int
    lr: float
    engine: str | dict[str, object]
    precision: str
    extra: dict[str, object]
    threads: int
    seed: int
    launched: float

    @classmethod
    def read(cls) -> Task:
        """Reads the file that the command line names, and seeds torch and numpy."""
        task = cls(**json.loads(Path(sys.argv[1]).read_text("utf-8")))
        torch.manual_seed(task.seed)
        np.random.seed(task.seed)
        return task

    @property
    def dtype(self) -> torch.dtype | None:
        """The type for autocast; None in float32."""
        return torch.bfloat16 if self.precision == "bf16" else None


@dataclass(frozen=True)
class Images:
    """The data of a run.

    Attributes:
        x: training images uint8 [n, 3, 32, 32].
        y: their classes int64 [n].
        held_x: images that no client has, for the evaluation after each round.
        held_y: their classes.
        clients: numbers of each client's images, int64 [clients, images of a client].
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    clients: Tensor


def load(folder: str | Path) -> Images:
    """Reads the arrays of a run."""
    names = ("x", "y", "held_x", "held_y", "clients")
    return Images(*(torch.from_numpy(np.load(Path(folder) / f"{name}.npy")) for name in names))


def cnn() -> nn.Sequential:
    """Returns the CNN of pfl-research's CIFAR-10 benchmark: 1,626,442 parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model


def normalised(x: Tensor) -> Tensor:
    """Returns uint8 images as float32 of mean 0 and standard deviation 1 in each channel."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> float:
    """Returns the accuracy of `model` on normalised images; also computes the loss, as all do.

    Args:
        model: the model.
        x: images float32 [n, 3, 32, 32].
        y: classes [n].
        dtype: type for autocast; None: float32.
    """
    model.eval()
    right = loss = 0.0
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for images, labels in zip(x.split(500), y.split(500), strict=True):
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(1) == labels).sum().item()
    model.train()
    return right / len(y)


class Clock:
    """Times of a run: the start, each round with the evaluation after it, the end."""

    def __init__(self, task: Task) -> None:
        """Makes the clock of a task; it starts when the process was launched."""
        self._task = task
        self._laps: list[float] = [task.launched]

    def lap(self) -> None:
        """Notes that a round is over; the first call says that the first round begins."""
        self._laps.append(time.time())

    def write(self, accuracy: float, packages: list[str]) -> None:
        """Writes the result of the run as JSON; the run must have ended before.

        Args:
            accuracy: share of the held-out images that are classified rightly after the last round.
            packages: names of packages whose versions are reported.

        Raises:
            RuntimeError: if there were not as many laps as rounds.
        """
        seconds = [b - a for a, b in zip(self._laps, self._laps[1:], strict=False)]
        if len(seconds) != self._task.rounds + 1:
            raise RuntimeError(f"{len(seconds) - 1} of {self._task.rounds} rounds were timed")
        result = {
            "start": seconds[0],
            "rounds": seconds[1:],
            "end": time.time() - self._laps[-1],
            "accuracy": accuracy,
            "versions": {name: importlib.metadata.version(name) for name in ["torch", *packages]},
        }
        Path(self._task.out).write_text(json.dumps(result), "utf-8")
