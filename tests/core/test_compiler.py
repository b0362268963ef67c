"""torch's compiler is not imported for optimizers and counters, and works as before once it is."""

import subprocess
import sys

import pytest

STEP = """
import sys, torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
import fedpress.core.compiler as compiler
if {postponed}: compiler.postpone_compiler()
{before}
torch.manual_seed(0)
model = nn.Linear(3, 2)
optimizer = torch.optim.{kind}(model.parameters(), 0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
assert not any(p.grad.requires_grad or not p.requires_grad for p in model.parameters())
with FlopCounterMode(display=False) as counter:
    model(torch.ones(1, 3))
print([p.tolist() for p in model.parameters()], counter.get_total_flops())
print("torch._dynamo" in sys.modules)
"""


def said(**given):
    code = STEP.format(**given)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_steps_and_counts_are_the_same_without_the_compiler(kind):
    numbers, imported = said(postponed=False, before="", kind=kind)
    assert imported == "True"
    assert said(postponed=True, before="", kind=kind) == [numbers, "False"]
    # Imported in between: torch's own functions are called again, and are marked.
    assert said(postponed=True, before="import torch._dynamo", kind=kind) == [numbers, "True"]
