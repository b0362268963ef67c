"""Makes the zoo importable, and traces each of its networks once."""

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import zoo

from fedpress.compress import trace


@cache
def _traced(name):
    model, x = zoo.make(name)
    return model, x, trace(model, x)


@pytest.fixture
def traced():
    """Returns (model, example, graph) of a network of the zoo by name; do not change the model, copy it."""
    return _traced
