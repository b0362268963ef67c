"""A recipe becomes a run: everything is bound and checked first, then stage after stage runs, is measured and saved."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fedpress
from fedpress import data as data_sets
from fedpress.compress import cost
from fedpress.errors import RecipeError
from fedpress.folder import RunFolder, StageFolder, write_json
from fedpress.models import ModelSpec
from fedpress.privacy.ledger import Ledger
from fedpress.recipe import Recipe
from fedpress.seeds import derive
from fedpress.state import Event, StageFinished, StageStarted, State
from fedpress.training import evaluate

LIBRARIES = ("torch", "numpy", "safetensors", "dp-accounting", "onnx", "onnxruntime", "pydantic")


def load_data(recipe: Recipe, *, progress: data_sets.Progress | None = None) -> data_sets.FederatedData:
    """Loads the recipe's data set, dealt to clients."""
    return data_sets.load(recipe.data, derive(recipe.seed, "data"), progress=progress)


def start(recipe: Recipe, data: data_sets.FederatedData) -> State:
    """Returns the state before the first stage: fresh weights.

    Raises:
        RecipeError: if the model does not take the data's examples or has another number of classes.
    """
    examples = next(a for a in (data.public, data.test, *data.clients.values()) if len(a))
    spec = ModelSpec(
        architecture=recipe.model.architecture,
        arguments=recipe.model.arguments,
        input_shape=tuple(examples.x.shape[1:]),
        mean=data.preprocess.mean,
        std=data.preprocess.std,
        class_names=data.class_names,
    )
    torch.manual_seed(derive(recipe.seed, "weights"))
    model = spec.build()
    try:
        with torch.inference_mode():
            logits = model.eval()(data.preprocess(examples.x[:2]))
    except (RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"recipe.model: '{spec.architecture}' does not take examples of shape {list(spec.input_shape)} "
            f"({str(error).splitlines()[0]}); fit recipe.model.arguments to the data"
        ) from error
    if logits.shape != (min(2, len(examples)), data.num_classes):
        raise RecipeError(
            f"recipe.model: '{spec.architecture}' gives {list(logits.shape[1:])} outputs but the data has "
            f"{data.num_classes} classes; set recipe.model.arguments.num_classes = {data.num_classes}"
        )
    return State(spec, model.train(), data, recipe.seed, cost.parameters(model))


def check(recipe: Recipe, data: data_sets.FederatedData) -> list[dict[str, Any]]:
    """Binds every stage in turn without training and returns what each will do, cost and send.

    Raises:
        FedpressError: the first thing that would stop the run.
    """
    state, lines = start(recipe, data), []
    for index, stage in enumerate(recipe.stage):
        try:
            state, facts = stage.check(state)
        except RecipeError as error:
            raise RecipeError(f"recipe.stage[{index}] ({stage.kind}): {error}") from error
        size = {"parameters": cost.parameters(state.model), "macs": _macs(state)}
        lines.append({"kind": stage.kind, "name": stage.name, **size, **facts})
    return lines


def settings(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as JSON, without what may differ between machines: the data's path."""
    tree: dict[str, Any] = json.loads(recipe.model_dump_json())
    tree["data"].pop("path", None)
    return tree


def execute(
    recipe: Recipe, folder: RunFolder, data: data_sets.FederatedData, *, reuse: Path | None = None
) -> Iterator[Event]:
    """Runs the stages that are not done yet; yields what happens, and leaves `result.json` in the folder.

    Args:
        recipe: the checked recipe.
        folder: where everything goes.
        data: the loaded data set.
        reuse: another run folder, whose finished stages are taken over while their settings are equal.

    Raises:
        FedpressError: if a stage cannot go on; what was computed is saved.
    """
    state = start(recipe, data)
    results: list[dict[str, Any]] = []
    for index, stage in enumerate(recipe.stage):
        place, key = folder.stage(index, stage.kind, stage.name), stage_key(recipe, index)
        done = place.finished(key)
        if done is None and reuse is not None and place.adopt(reuse, key):
            done = place.finished(key)
        yield StageStarted(index, stage.kind, stage.name, reused=done is not None)
        if done is not None:
            spec, model = place.load()
            ledger = done.get("ledger")
            state = replace(
                state, spec=spec, model=model, ledger=Ledger.from_json(json.dumps(ledger)) if ledger else None
            )
        else:
            if index == 0 or results:
                begin = time.perf_counter()
            state, before = replace(state, facts={}), _seconds(place)
            state = yield from stage.run(state, place)
            seconds = before + time.perf_counter() - begin
            done = _measure(state, stage.kind, stage.name, seconds)
            place.finish(state.spec, state.model, done, key=key)
        state = replace(state, accuracy=done["accuracy"])
        results.append(done)
        _write_result(recipe, folder, results, finished=index + 1 == len(recipe.stage))
        yield StageFinished(index, done)


def _seconds(place: StageFolder) -> float:
    """Time spent on this stage before the run was stopped."""
    saved = place.load_progress()
    if saved is None:
        place.run.cut_records(_records_before(place))
        return 0.0
    return float(saved[1].get("seconds", 0.0))


def _records_before(place: StageFolder) -> int:
    """How many records belong to earlier stages."""
    if not place.run.records.exists():
        return 0
    lines = place.run.records.read_bytes().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return sum(1 for record in whole if record["stage"] < place.index)


def stage_key(recipe: Recipe, index: int) -> str:
    """Names the result of stage `index`: equal keys mean equal data, model, seed and stages up to here."""
    tree = settings(recipe)
    tree = {k: tree[k] for k in ("seed", "data", "model", "stage")}
    tree["stage"] = tree["stage"][: index + 1]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _measure(state: State, kind: str, name: str, seconds: float) -> dict[str, Any]:
    """The line of one stage: measured on the test set once, here, for reporting only."""
    facts = dict(state.facts)
    ledger = {"ledger": json.loads(state.ledger.to_json())} if state.ledger is not None else {}
    test = evaluate(state.model, state.data.test, state.data.preprocess)
    model = state.model.to("cpu")
    line: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "seconds": round(seconds, 2),
        "accuracy": test.accuracy,
        "loss": test.loss,
        "parameters": cost.parameters(model),
        "macs": _macs(state),
        "file_bytes": cost.state_bytes(model),
    }
    if "latency_ms" not in facts:
        speed = cost.latency(model, torch.zeros(1, *state.spec.input_shape))
        line |= {"latency_ms": speed.median_ms, "runtime": "torch"}
    return line | facts | ledger


def _macs(state: State) -> int:
    example = torch.zeros(1, *state.spec.input_shape)
    return cost.macs(state.model.to("cpu"), example)


def _write_result(recipe: Recipe, folder: RunFolder, results: list[dict[str, Any]], *, finished: bool) -> None:
    if results[-1].get("ledger"):
        write_json(folder.path / "ledger.json", results[-1]["ledger"])
    lines = [{k: v for k, v in r.items() if k != "ledger"} for r in results]
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    write_json(
        folder.path / "result.json",
        {
            "recipe": recipe.name,
            "version": fedpress.__version__,
            "seed": recipe.seed,
            "seconds": round(sum(r["seconds"] for r in lines), 2),
            "finished": finished,
            "stages": lines,
            "final": merged,
        },
    )


def environment(command: str) -> dict[str, Any]:
    """Returns versions, machine, commit and command: what a reader needs to judge the numbers."""
    return {
        "fedpress": fedpress.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": command,
    }


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
        name = cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    import os

    return f"{name}, {os.cpu_count()} cores{gpu}, {platform.system()}"


def _commit() -> str | None:
    """The commit of the source tree that runs, with a mark if it was changed; None outside a checkout."""
    root = Path(fedpress.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()
