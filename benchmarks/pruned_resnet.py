"""What several benchmarks begin with: CIFAR-10 as in the reference experiment, and its fine-tuned network."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fedpress import data
from fedpress.data import FederatedData
from fedpress.models import ModelSpec, load_model
from fedpress.pipeline.recipe import load

RECIPE = """
[data]
source = "cifar10"
num_clients = 10
examples_per_client = 600
validation = 2000
[model]
architecture = "resnet18"
[[stage]]
kind = "export"
"""


def cifar10(path: Path, *changes: str) -> FederatedData:
    """Returns 10 clients of 600 images, 2,000 for validation, the other 42,000 public; but for `changes`, key=value."""
    return data.load(load(RECIPE, [f"data.path={json.dumps(str(path))}", *changes]).data, 0)


def network() -> tuple[ModelSpec, nn.Module]:
    """Returns the ResNet-18 of 30% of the parameters: 3.36 M, 93.17%."""
    return load_model(Path(__file__).parent / "checkpoints" / "cifar10-cpu")
