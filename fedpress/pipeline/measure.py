"""The one place that measures what a model is worth and what it costs."""

from __future__ import annotations

from typing import Any

from fedpress import storage
from fedpress.compress import cost
from fedpress.deploy.processor import conditions
from fedpress.tasks import Task
from fedpress.training.device import place_
from fedpress.training.evaluate import evaluate
from fedpress.workspace.state import State

COSTS = (
    "task", "test_examples", "loss", "parameters", "nonzero_parameters", "macs", "file_bytes",
    "packed_file_bytes", "latency_ms", "runtime", "conditions",
)  # fmt: skip


def measured_keys(task: Task) -> tuple[str, ...]:
    """Returns all keys that `measure` gives."""
    return (*task.keys, *COSTS)


def measure(state: State, *, latency: bool = True) -> dict[str, Any]:
    """Returns metrics and costs of the model of `state`; metrics are None without a test set.

    The file is that of its numbers in float32, or packed where weights lie on grids.
    """
    test, task = state.data.test, state.data.task
    loss, metrics = None, dict[str, Any](dict.fromkeys(task.keys))
    if len(test):
        model = place_(state.model, state.device)
        found = evaluate(model, test, state.data.preprocess, task, all_metrics=True)
        loss = found.loss
        metrics |= found.metrics
    model = state.model.to("cpu")
    line: dict[str, Any] = {
        "task": task.kind,
        "test_examples": len(test),
        **metrics,
        "loss": loss,
        "parameters": cost.parameters(model),
        "macs": macs_of(state),
        "file_bytes": storage.file_bytes(state.spec, model),
    }
    if (
        state.spec.sparse or "density" in state.facts
    ):  # what zeros are worth shows in these two alone
        line["nonzero_parameters"] = storage.nonzero_parameters(model)
        line["packed_file_bytes"] = storage.packed_file_bytes(state.spec, model)
    if latency:
        speed = cost.latency(model, state.example(1))
        # What lies on grids is computed on floats here; integers run in an exported file.
        line |= {
            "latency_ms": speed.median_ms,
            "runtime": "torch, simulated" if state.spec.quantized else "torch",
        }
        # `cost.latency` computes on one thread, however many torch has otherwise.
        line["conditions"] = conditions("torch", threads=1, options={})
    return line


def macs_of(state: State) -> int:
    """Returns the multiply-adds of one example."""
    return cost.macs(state.model.to("cpu"), state.example(1))
