"""Small recipes of the sparse stages, and the zeros that they leave."""

from __future__ import annotations

from pathlib import Path

from fedpress.models import load_model

HEAD = """
name = "sparse"
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
public_share = 0.3
validation = 60
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [48, 30] }
"""
TRAIN = '[[stage]]\nkind = "train"\nepochs = 1\nbatch_size = 32\nlr = 0.05\n'


def zeros(path: Path) -> tuple[int, int]:
    """Counts the entries and the kept ones of the sparse weights of a saved model."""
    spec, model = load_model(path)
    weights = dict(model.named_parameters())
    return sum(weights[n].numel() for n in spec.sparse), sum(
        int((weights[n] != 0).sum()) for n in spec.sparse
    )
