"""A recipe becomes a run: everything is bound and checked first, then stage after stage runs, is measured and saved."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedpress
from fedpress import data as data_sets
from fedpress import storage
from fedpress.compress import cost
from fedpress.core import consent
from fedpress.core.random import derive, fingerprint
from fedpress.data.examples import Progress
from fedpress.deploy.processor import as_json, conditions, this_processor
from fedpress.errors import FedpressError, RecipeError, RunError
from fedpress.models import ModelSpec
from fedpress.models.weights import load_weights_
from fedpress.nn.quantized import kept_entries, note_kept_zeros_, settle_
from fedpress.pipeline.recipe.settings import Recipe
from fedpress.privacy.ledger import Ledger
from fedpress.stages import Stage
from fedpress.stages.measure import MeasureStage
from fedpress.stages.teaching import FROM_THE_RUN, saved_teacher
from fedpress.tasks.judged import JUDGED, judged
from fedpress.training.device import place_
from fedpress.training.evaluate import evaluate
from fedpress.workspace import started
from fedpress.workspace.folder import CURES, Done, RunFolder, StageFolder, list_json, read_json
from fedpress.workspace.state import Event, Loader, StageFinished, StageStarted, State, Tick

MEASURED = (
    "accuracy", *JUDGED, "loss", "parameters", "nonzero_parameters", "macs", "file_bytes", "packed_file_bytes",
    "latency_ms", "runtime", "conditions",
)  # fmt: skip
ADDED_TO_DATA = ("classes", "words", "public_words", "unknown", "encoding", "decimal")
"""Keys that older run folders do not know: left out of the settings where they say nothing, so that those resume."""
BITS = ("fedpress", "python", "torch", "numpy", "processor", "instructions", "device", "threads")
"""What of the environment decides how sums are rounded: the same seed gives the same bits where these are the same."""
LIBRARIES = ("torch", "numpy", "safetensors", "dp-accounting", "onnx", "onnxruntime", "pydantic")


def load_data(recipe: Recipe, *, progress: Progress | None = None) -> data_sets.FederatedData:
    """Loads the recipe's data set, dealt to clients.

    A source `module:function` is called; from now on the files of runs may name it too.
    """
    if consent.NAME.fullmatch(recipe.data.source):
        consent.allow(recipe.data.source)
    return data_sets.load(recipe.data, derive(recipe.seed, "data"), progress=progress)


def start(recipe: Recipe, data: data_sets.FederatedData) -> State:
    """Returns the state before the first stage: fresh weights.

    Raises:
        RecipeError: if the model does not take the data's examples or has another number of classes.
    """
    examples = next(a for a in (data.public, data.test, *data.clients.values()) if len(a))
    about: dict[str, Any] = {
        "input_shape": tuple(examples.x.shape[1:]),
        "mean": data.preprocess.mean,
        "std": data.preprocess.std,
        **({"class_names": data.class_names} if data.labelled else {}),
        "input_dtype": "int64" if examples.x.dtype == torch.int64 else "float32",
    }
    torch.manual_seed(derive(recipe.seed, "weights"))
    if recipe.model.checkpoint is not None:
        spec, model = storage.load(recipe.model.checkpoint)
        spec = spec.model_copy(update=about)
    else:
        assert recipe.model.architecture is not None
        spec = ModelSpec(
            architecture=recipe.model.architecture, arguments=recipe.model.arguments, **about
        )
        spec, model = spec.take_in()
        if recipe.model.weights is not None:
            masked = load_weights_(model, recipe.model.weights)
            spec = spec.model_copy(update={"sparse": tuple(dict.fromkeys((*spec.sparse, *masked)))})
    try:
        with torch.inference_mode():
            logits = model.eval()(data.preprocess(examples.x[:2]))
    except Exception as error:  # whatever somebody's own network raises
        raise RecipeError(
            f"recipe.model: '{spec.architecture}' does not take examples of shape {list(spec.input_shape)} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); fit recipe.model.arguments to the data"
        ) from error
    wanted = (min(2, len(examples)), data.num_classes)
    if data.labelled and not (isinstance(logits, Tensor) and logits.dim() == 2):
        got = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(
            f"recipe.model: '{spec.architecture}' gives outputs {got} for one example, not [classes] as a "
            "classifier does, and accuracy needs one; without labels (a command without data, or with inputs alone) it "
            "can be cut, quantized and exported"
        )
    if data.labelled and logits.shape != wanted:
        got = list(logits.shape[1:])
        raise RecipeError(
            f"recipe.model: '{spec.architecture}' gives outputs {got} for one example but the data has "
            f"{data.num_classes} classes; make it return {data.num_classes} numbers, for instance with "
            f"recipe.model.arguments.num_classes = {data.num_classes}"
        )
    return State(spec, model.train(), data, recipe.seed, cost.parameters(spec.build_dense()))


def check(recipe: Recipe, data: data_sets.FederatedData) -> list[dict[str, Any]]:
    """Binds every stage in turn without training and returns what each will do, cost and send.

    Raises:
        FedpressError: the first thing that would stop the run.
    """
    state, lines = start(recipe, data), []
    trained = recipe.model.trained
    for index, stage in enumerate(recipe.stage):
        before = state
        try:
            state, facts = stage.check(state)
        except FedpressError as error:
            raise type(error)(_placed(str(error), index, stage)) from error
        state = _with_parent(state, before, partial(_pair, before) if trained else None)
        trained = True
        size = {"parameters": cost.parameters(state.model), "macs": _macs(state)}
        lines.append({"kind": stage.kind, "name": stage.name, **size, **facts})
    return lines


def _with_parent(state: State, before: State, load: Loader | None) -> State:
    """Notes how to `load` the model `before` the first stage that changed the spec; None for weights nobody trained."""
    if (
        state.parent is None
        and load is not None
        and state.spec.model_dump() != before.spec.model_dump()
    ):
        return replace(state, parent=load)
    return state


def _pair(state: State) -> tuple[ModelSpec, nn.Module]:
    return state.spec, state.model


def _started(recipe: Recipe, data: data_sets.FederatedData) -> tuple[ModelSpec, nn.Module]:
    return _pair(start(recipe, data))


def _placed(message: str, index: int, stage: Stage) -> str:
    """`federate.norm: ...` of a stage that knows no numbers -> `recipe.stage[3].norm: ...`."""
    at = f"recipe.stage[{index}]"
    for word in (stage.kind, "stage"):
        if message.startswith((f"{word}.", f"{word}:")):
            return at + message.removeprefix(word)
    return f"{at} ({stage.name}): {message}"


def settings(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as JSON, without what may differ between machines: the data's path.

    A checkpoint or a teacher stands in it by its content.
    """
    tree: dict[str, Any] = json.loads(recipe.model_dump_json())
    tree["data"].pop("path", None)
    for key in ADDED_TO_DATA:
        if type(recipe.data).model_fields[key].default == getattr(recipe.data, key):
            tree["data"].pop(key)
    if recipe.model.checkpoint is not None:
        model = storage.load(recipe.model.checkpoint)[1]
        tree["model"]["checkpoint"] = fingerprint(*model.state_dict().values())
    if recipe.model.weights is not None:
        tree["model"]["weights"] = hashlib.sha256(recipe.model.weights.read_bytes()).hexdigest()
    for stage in tree["stage"]:
        if stage.get("teacher") not in (None, *FROM_THE_RUN):
            teacher = saved_teacher(stage["teacher"])[1]
            stage["teacher"] = fingerprint(*teacher.state_dict().values())
    return tree


def execute(
    recipe: Recipe,
    folder: RunFolder,
    data: data_sets.FederatedData,
    *,
    reuse: RunFolder | None = None,
) -> Iterator[Event]:
    """Runs the stages that are not done yet; yields what happens, and leaves `result.json` in the folder.

    Args:
        recipe: the checked recipe.
        folder: where everything goes.
        data: the loaded data set.
        reuse: another run, whose finished stages are taken over while their settings are equal.

    Raises:
        RunError: if another process works in the folder.
        FedpressError: if a stage cannot go on; what was computed is saved.
    """
    with folder.locked():
        yield from _stages(recipe, folder, data, reuse)


def _stages(
    recipe: Recipe, folder: RunFolder, data: data_sets.FederatedData, reuse: RunFolder | None
) -> Iterator[Event]:
    state, records = start(recipe, data), 0
    load: Loader | None = None
    if recipe.model.checkpoint is not None:
        load = partial(storage.load, recipe.model.checkpoint)
    elif recipe.model.trained:
        load = partial(_started, recipe, data)
    results: list[dict[str, Any]] = []
    for index, (stage, key) in enumerate(zip(recipe.stage, stage_keys(recipe), strict=True)):
        place = folder.stage(index, stage.kind, stage.name)
        done = place.finished(key)
        if done is None and reuse is not None:
            done = place.adopt(reuse, key, records=records)
        if done is not None:
            folder.check_records(done.records)
        yield StageStarted(index, stage.kind, stage.name, reused=done is not None)
        if done is None:
            done = yield from _do(
                stage, replace(state, facts={}), place, key, records, results[-1:]
            )
        # On goes what was saved, not what is in memory: so a run that is resumed here has the same model to the bit.
        spec, model = place.load()
        before = state
        # The line of an export tells of the file; the model is still worth what it was.
        accuracy = (
            state.accuracy if stage.kind in ("export", "measure") else done.result["accuracy"]
        )
        state = replace(state, spec=spec, model=model, ledger=_ledger(done), accuracy=accuracy)
        state, load = _with_parent(state, before, load), place.load
        records = done.records
        results.append(done.result)
        told = data.told_left_out(private=recipe.private)
        _write_result(
            recipe, folder, results, finished=index + 1 == len(recipe.stage), left_out=told
        )
        yield StageFinished(index, done.result)


def _do(
    stage: Stage,
    state: State,
    place: StageFolder,
    key: str,
    records: int,
    last: Sequence[dict[str, Any]],
) -> Generator[Event, None, Done]:
    """Runs one stage from its last checkpoint, measures it, and saves it; `last` is the line before its own, if any."""
    began, before = time.perf_counter(), place.begin(records)
    try:
        state = yield from stage.run(state, place)
    except RunError:
        raise
    except FedpressError as error:
        raise type(error)(_placed(str(error), place.index, stage)) from error
    state = _settled(state)
    seconds = before + time.perf_counter() - began
    if last and isinstance(
        stage, MeasureStage
    ):  # it has changed nothing: the run is worth and costs what it did
        told = {key: value for key, value in last[0].items() if key in MEASURED}
    else:
        yield Tick(1, 1, f"measuring on {len(state.data.test):,} test examples")
        told = measure(state, latency="latency_ms" not in state.facts)
    return place.finish(state.spec, state.model, _line(state, stage, seconds, told), key=key)


def _settled(state: State) -> State:
    """Moves weights onto their grids, beside which training left them; which of them are pruned stays known."""
    kept = kept_entries(state.model, state.spec.sparse if state.spec.quantized else ())
    settle_(state.model)
    noted = note_kept_zeros_(state.model, kept)
    if noted == state.spec.kept_zeros:
        return state
    return replace(state, spec=state.spec.model_copy(update={"kept_zeros": noted}))


def _ledger(done: Done) -> Ledger | None:
    page = done.result.get("ledger")
    return Ledger.from_json(json.dumps(page)) if page else None


def stage_keys(recipe: Recipe) -> list[str]:
    """Names the result of each stage: equal keys mean equal data, model, seed and stages up to there."""
    tree = settings(recipe)
    same = {key: tree[key] for key in ("seed", "data", "model")}
    texts = (
        json.dumps({**same, "stage": tree["stage"][: at + 1]}, sort_keys=True)
        for at in range(len(tree["stage"]))
    )
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def _line(state: State, stage: Stage, seconds: float, told: dict[str, Any]) -> dict[str, Any]:
    """The line of one stage, with what was measured on the test set once, for reporting only."""
    ledger = {"ledger": json.loads(state.ledger.to_json())} if state.ledger is not None else {}
    line = {"kind": stage.kind, "name": stage.name, "seconds": round(seconds, 2)}
    return line | told | dict(state.facts) | ledger


def measure(state: State, *, latency: bool = True) -> dict[str, Any]:
    """Returns what the model of `state` is worth and what it costs; accuracy is None without test examples.

    The file is that of its numbers in float32, or packed where weights lie on grids.
    """
    test = state.data.test
    found, beside = None, dict[str, Any](dict.fromkeys(JUDGED))
    if len(test):
        found = evaluate(place_(state.model), test, state.data.preprocess, keep_logits=True)
        assert found.logits is not None, "they were asked for"
        beside = judged(found.logits, test.y, state.data.class_names)
    model = state.model.to("cpu")
    line: dict[str, Any] = {
        "accuracy": found.accuracy if found else None,
        **beside,
        "loss": found.loss if found else None,
        "parameters": cost.parameters(model),
        "macs": _macs(state),
        "file_bytes": storage.file_bytes(state.spec, model),
    }
    if (
        state.spec.sparse or "density" in state.facts
    ):  # what zeros are worth shows in these two alone
        line["nonzero_parameters"] = storage.nonzero_parameters(model)
        line["packed_file_bytes"] = storage.packed_file_bytes(state.spec, model)
    if latency:
        speed = cost.latency(model, state.spec.example(1))
        # What lies on grids is computed on floats here; integers run in an exported file.
        line |= {
            "latency_ms": speed.median_ms,
            "runtime": "torch, simulated" if state.spec.quantized else "torch",
        }
        line["conditions"] = conditions("torch", threads=torch.get_num_threads(), options={})
    return line


def _macs(state: State) -> int:
    return cost.macs(state.model.to("cpu"), state.spec.example(1))


def _write_result(
    recipe: Recipe,
    folder: RunFolder,
    results: list[dict[str, Any]],
    *,
    finished: bool,
    left_out: str,
) -> None:
    if results[-1].get("ledger"):
        list_json(folder.path / "ledger.json", results[-1]["ledger"], folder.path)
    lines = [{k: v for k, v in r.items() if k != "ledger"} for r in results]
    _take_accuracy_of_files_(lines)
    total = round(sum(line["seconds"] for line in lines), 2)
    final: dict[str, Any] = {}
    for line in lines:
        final |= line
    list_json(
        folder.path / "result.json",
        {
            "recipe": recipe.name,
            "version": fedpress.__version__,
            "seed": recipe.seed,
            "seconds": total,
            "finished": finished,
            **({"left_out": left_out} if left_out else {}),
            "stages": lines,
            "final": final | {"seconds": total},
        },
        folder.path,
    )


def _take_accuracy_of_files_(lines: Sequence[dict[str, Any]]) -> None:
    """Gives a quantize stage the accuracy of the file that was exported of its model: a device runs that.

    With it goes what stands beside it. What the simulation in torch reached stays as `accuracy_simulated`.
    """
    for at, line in enumerate(lines):
        if line["kind"] != "export" or line.get("accuracy") is None:
            continue
        same_model = ("export", "measure", "pack")
        source = next((x for x in reversed(lines[:at]) if x["kind"] not in same_model), None)
        if source is not None and source["kind"] == "quantize":
            source.setdefault("accuracy_simulated", source["accuracy"])
            source.update({key: line[key] for key in ("accuracy", *JUDGED) if key in line})


def note_environment(
    folder: RunFolder, command: str, origin: Mapping[str, Any] | None = None
) -> list[str]:
    """Writes `environment.json`; when a run is resumed, adds what is different from its start, the command at least.

    Args:
        folder: of the run.
        command: that was given.
        origin: where the recipe came from and what was overridden in it, noted at the start alone.

    Returns:
        What a person must know who goes on: that the bits will differ from those of a run that was never stopped,
        where processor, threads or versions are others, and that records are missing.
    """
    path, now = folder.path / "environment.json", environment(command)
    told: list[str] = []
    if path.exists():
        first = read_json(path, cure=CURES[path.name])
        changed = {key: value for key, value in now.items() if first.get(key) != value}
        if not read_finished(folder):
            told = [*_other_bits(first, now), *folder.missing_records()]
        now = {**first, "resumed": [*_list(first.get("resumed")), changed]}
    else:
        now |= origin or {}
        text = folder.path / "recipe.toml"
        if text.exists() and (names := started.functions_of(text.read_text("utf-8"))):
            now["started_by"] = started.mark(names, now.get("recipe"))
    list_json(path, now, folder.path)
    return told


def read_finished(folder: RunFolder) -> bool:
    """Whether the run has come to its end."""
    path = folder.path / "result.json"
    return path.exists() and bool(read_json(path, cure=CURES[path.name]).get("finished"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _other_bits(first: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says how this process differs from any that worked on the run before, if sums may be rounded otherwise by it."""
    earlier = [first, *(first | e for e in _list(first.get("resumed")) if isinstance(e, dict))]
    differ = []
    for key in BITS:
        known = list(dict.fromkeys(_name(e[key]) for e in earlier if e.get(key) is not None))
        if known and known != [_name(now.get(key))]:
            differ.append(f"{key} {', '.join(known)} before, {_name(now.get(key))} now")
    if not differ:
        return []
    return [
        f"this run was begun elsewhere ({'; '.join(differ)}): it goes on, but its bits will differ from those of a run "
        "that was never stopped"
    ]


def _name(value: Any) -> str:
    """What a processor is called; anything else as it is."""
    return str(value.get("name")) if isinstance(value, dict) else str(value)


def environment(command: str) -> dict[str, Any]:
    """Returns versions, machine, commit and command: what a reader needs to judge the numbers."""
    return {
        "fedpress": fedpress.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "machine": _machine(),
        "processor": as_json(this_processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": command,
    }


def _processor() -> str:
    try:
        cpu = next(
            x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
        )
        return cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {os.cpu_count()} cores{gpu}, {platform.system()}"


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
