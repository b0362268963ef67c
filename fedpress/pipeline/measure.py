"""Measures the model after a stage: metrics on the test set, parameters, MACs, bytes, latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedpress import storage
from fedpress.compress import cost
from fedpress.deploy.processor import conditions
from fedpress.tasks import MOST_PARTS, Task, description
from fedpress.tasks.base import json_number
from fedpress.training.device import place_
from fedpress.training.evaluate import evaluate
from fedpress.workspace.state import State

COSTS = (
    "task", "task_metrics", "test_examples", "test_clients", "worst_tenth", "loss", "parameters",
    "nonzero_parameters", "macs", "file_bytes", "packed_file_bytes", "latency_ms", "runtime",
    "conditions",
)  # fmt: skip
"""Keys that `measure` may return for every task, beside the metrics of the task."""


def measured_keys(task: Task) -> tuple[str, ...]:
    """Returns all keys of the dictionary that `measure` may return for this task."""
    return (*task.keys, _by_client(task), *COSTS)


def measure(state: State, *, latency: bool = True) -> dict[str, Any]:
    """Measures the model of `state`.

    Args:
        state: the model, the data and the device.
        latency: whether to measure the latency too, in torch on one thread.

    Returns:
        The metrics of the task (None without a test set) and the costs. If the test examples are of
        several natural clients, also the primary metric of each (`auc_by_client`, for up to
        `MOST_PARTS` of them, with their names as `test_clients`) and the mean of the worst tenth of
        clients, at least one (`worst_tenth`), which shows what a mean over all hides. `file_bytes`
        is the size of a file with float32 weights; for a quantized model, of a file with packed
        integers.
    """
    test, task = state.data.test, state.data.task
    loss, metrics = None, dict[str, Any](dict.fromkeys(task.keys))
    if len(test):
        model = place_(state.model, state.device)
        found = evaluate(
            model,
            test,
            state.data.preprocess,
            task,
            all_metrics=True,
            groups=state.data.test_owners,
        )
        loss = found.loss
        metrics |= found.metrics
        metrics |= by_client(task, state.data.test_owner_names, found.group_scores)
    # Costs are measured on the CPU, so that they are comparable between machines with and without
    # GPU.
    model = state.model.to("cpu")
    line: dict[str, Any] = {
        **description(task),
        "test_examples": len(test),
        **metrics,
        "loss": loss,
        "parameters": cost.parameters(model),
        "macs": macs_of(state),
        "file_bytes": storage.file_bytes(state.spec, model),
    }
    # Zeros make neither the float32 file nor the MACs smaller. Only the two numbers below show the
    # effect of zeros.
    if state.spec.sparse or "density" in state.facts:
        line["nonzero_parameters"] = storage.nonzero_parameters(model)
        line["packed_file_bytes"] = storage.packed_file_bytes(state.spec, model)
    if latency:
        speed = cost.latency(model, state.example(1))
        # torch computes a quantized model in float32. Only an exported file computes on integers.
        line |= {
            "latency_ms": speed.median_ms,
            "runtime": "torch, simulated" if state.spec.quantized else "torch",
        }
        # `cost.latency` always uses one thread, whatever number torch is set to.
        line["conditions"] = conditions("torch", threads=1, options={})
    return line


def by_client(task: Task, names: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """Returns the entries for the scores of clients; none for fewer than two clients.

    Args:
        task: the task.
        names: names of the clients.
        scores: the primary metric of each client; NaN where it is undefined.

    >>> from fedpress.tasks import Binary
    >>> by_client(Binary(("no", "yes")), ("a", "b"), (0.9, 0.7))["worst_tenth"]
    0.7
    """
    if len(scores) < 2:
        return {}
    known = sorted((s for s in scores if math.isfinite(s)), reverse=not task.higher_is_better)
    worst = known[: math.ceil(len(scores) / 10)]
    told: dict[str, Any] = {"worst_tenth": math.fsum(worst) / len(worst) if worst else None}
    if len(scores) <= MOST_PARTS:
        told["test_clients"] = list(names)
        told[_by_client(task)] = [json_number(score) for score in scores]
    return told


def _by_client(task: Task) -> str:
    """Returns the key of the primary metric by client, such as "auc_by_client"."""
    return f"{task.primary}_by_client"


def macs_of(state: State) -> int:
    """Returns the number of multiply-adds (MACs) of the model for one example."""
    return cost.macs(state.model.to("cpu"), state.example(1))
