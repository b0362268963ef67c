"""Every mistake that docs/privacy-pitfalls.md names is stopped by code that exists, and by a test that exists."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpress.core import parameters
from fedpress.core.random_source import AesCtrRandom, TorchRandom
from fedpress.privacy.accounting.accountant import GaussianEvent, epsilon, noise_multiplier
from fedpress.privacy.noise.mechanism import clip, noise_sum
from fedpress.privacy.plan import PrivacyPlan

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "privacy-pitfalls.md"
NAMED = re.compile(r"`((?:fedpress|tests)/[\w/]+\.py)::([\w.]+)`")


def entries():
    """Returns title and text of each pitfall."""
    if not PAGE.exists():
        return []
    parts = re.split(r"^### ", PAGE.read_text("utf-8"), flags=re.M)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def defined(path):
    """Returns the functions, classes and methods of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return found


pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the pages are not part of an installed package"
)


@pytest.mark.parametrize(("title", "text"), entries())
def test_every_pitfall_names_code_and_tests_that_exist(title, text):
    named = NAMED.findall(text)
    assert any(path.startswith("fedpress/") for path, _ in named), (
        f"{title}: which function stops it?"
    )
    assert any(path.startswith("tests/") for path, _ in named), f"{title}: which test would fail?"
    for path, name in named:
        assert (ROOT / path).exists(), f"{title}: {path} does not exist"
        assert name in defined(ROOT / path), f"{title}: {path} has no {name}"
        assert name.startswith("test_") == path.startswith("tests/")
    assert text.count(".py") == len(named), f"{title}: a name is not written as `path.py::name`"


def test_pitfalls_are_numbered_and_none_is_missing():
    numbers = [int(title.partition(".")[0]) for title, _ in entries()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 30


def test_a_parameter_without_dimensions_is_clipped_like_any_other():
    model = nn.Linear(3, 2)
    model.scale = nn.Parameter(torch.tensor(100.0))
    update = clip(parameters.flatten(model), 1.0)
    assert update.shape == (9,)
    assert float(update.norm()) <= 1
    assert float(update.abs().max()) <= 1


@pytest.mark.parametrize(
    "chance", [TorchRandom(torch.Generator().manual_seed(0)), AesCtrRandom(bytes(32))]
)
def test_noise_falls_on_every_value_also_where_no_client_sent_one(chance):
    total = torch.zeros(1000)
    total[3] = 5.0
    noised = noise_sum(total, PrivacyPlan("client", 1.0, 1.0, noise_multiplier=1.0), chance)
    assert int((noised != total).sum()) == 1000


def test_the_classical_formula_would_break_the_budget_and_ours_does_not():
    budget, delta = 20.0, 1e-3
    classical = math.sqrt(2 * math.log(1.25 / delta)) / budget
    assert epsilon([GaussianEvent(1.0, classical, 1)], delta=delta) > 1.4 * budget
    for steps in (1, 50):
        ours = noise_multiplier(epsilon=budget, delta=delta, sampling_prob=1.0, steps=steps)
        assert epsilon([GaussianEvent(1.0, ours, steps)], delta=delta) <= budget
        assert ours > classical
