"""Runs a recipe with all combinations of given values (a sweep), and finds the Pareto fronts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedpress.core.random import derive
from fedpress.data import FederatedData
from fedpress.errors import FedpressError, RecipeError, RunError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.environment import environment, write_environment
from fedpress.pipeline.keys import settings_of, stage_keys
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.start import device_of, load_data
from fedpress.tasks import task_of
from fedpress.workspace import lock
from fedpress.workspace.atomic import read_json, write_json, writing
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Event

COPIED_KEYS = (
    "test_examples",
    "loss",
    "parameters",
    "macs",
    "file_bytes",
    "latency_ms",
    "runtime",
    "seconds",
)
"""Keys of a stage's result that are copied to `sweep.json`, besides name and main metric."""
MAX_FOLDER_NAME = 80  # characters of up to three bytes: file systems allow 255 bytes


@dataclass(frozen=True)
class Variant:
    """One combination of values.

    Attributes:
        name: short name for tables and folders, such as `keep_params=0.5 bits=8`.
        overrides: overrides of the recipe, such as `stage.1.keep_params=0.5`.
    """

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class VariantStarted:
    """A variant begins.

    Attributes:
        variant: the variant.
        events: the events of the variant. The variant runs while the caller iterates over them. The
            caller must iterate to the last event.
        notes: warnings about a resumed variant, for example that its processor has changed.
    """

    variant: Variant
    events: Iterator[Event]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariantFinished:
    """A variant has ended; `error` says why it failed, or is None if it succeeded."""

    variant: Variant
    error: FedpressError | None = None


def split_values(text: str) -> list[str]:
    """Splits a text at its commas, but not at commas inside `[ ]`, `{ }` and quotes.

    Raises:
        RecipeError: if a value is empty, or a bracket or quote is not closed.

    >>> split_values('0.5,[1, 2],{a = 1, b = 2},"x,y"')
    ['0.5', '[1, 2]', '{a = 1, b = 2}', '"x,y"']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    if quote or depth or not all(part.strip() for part in parts):
        raise RecipeError(
            f"'{text}' is no list of values",
            place="sweep",
            cure="write them as in 0.5,0.3 or [1, 2],[3, 4]",
        )
    return [part.strip() for part in parts]


def variants(values: Sequence[str], seeds: Sequence[int] = ()) -> list[Variant]:
    """Returns a variant for each combination of the values; the last key changes fastest.

    Args:
        values: for each key a text such as `stage.1.keep_params=0.5,0.3`.
        seeds: seeds of the recipe, as a further key.

    Raises:
        RecipeError: if a key has no values or is given twice.

    >>> [v.name for v in variants(["stage.1.keep_params=0.5,0.3", "stage.quantize.bits=8"])]
    ['keep_params=0.5', 'keep_params=0.3']
    """
    lists = _value_lists(values, seeds)
    # A key with one value is the same in all variants, so names of variants leave it out.
    names = _short_names([key for key, found in lists.items() if len(found) > 1])
    found = []
    for chosen in product(*lists.values()):
        pairs = list(zip(lists, chosen, strict=True))
        words = [f"{names[key]}={value}" for key, value in pairs if key in names]
        overrides = tuple(f"{key}={value}" for key, value in pairs)
        found.append(Variant(" ".join(words) or "all", overrides))
    return found


def common_overrides(variants: Sequence[Variant]) -> tuple[str, ...]:
    """Returns the overrides that are the same in all variants.

    >>> common_overrides(variants(["data.path=x.csv", "stage.1.keep_params=0.5,0.3"]))
    ('data.path=x.csv',)
    """
    first, *others = variants
    return tuple(
        word for word in first.overrides if all(word in other.overrides for other in others)
    )


def _value_lists(values: Sequence[str], seeds: Sequence[int]) -> dict[str, list[str]]:
    """Returns the values of each key, in the order given."""
    lists: dict[str, list[str]] = {}
    for entry in [*values, *([f"seed={','.join(map(str, seeds))}"] if seeds else [])]:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"'{entry}': expected key=value,value, for instance stage.1.keep_params=0.5,0.3",
                place="sweep",
            )
        if key in lists:
            raise RecipeError(
                f"'{key}' is given twice",
                place="sweep",
                cure="give all its values at once, separated by commas",
            )
        # A value that is given twice would run the same variant twice.
        lists[key] = list(dict.fromkeys(split_values(text)))
    return lists


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns a short name for each key: its last part if that is unique, else the whole key."""
    short = {key: key.rpartition(".")[2] for key in keys}
    words = list(short.values())
    return {key: word if words.count(word) == 1 else key for key, word in short.items()}


def execute(
    text: str,
    todo: Sequence[Variant],
    place: Path,
    *,
    extra: Sequence[str] = (),
    command: str = "fedpress sweep",
) -> Iterator[VariantStarted | VariantFinished]:
    """Runs each variant in a run folder of its own, and writes `sweep.json` after each variant.

    The first stages of a variant are copied if an earlier variant ran them with equal settings. An
    interrupted variant is resumed. If a variant fails, the sweep notes the error and goes on.

    Args:
        text: the recipe as TOML.
        todo: the variants.
        place: folder of the sweep; the runs are in its folder `variants`.
        extra: further overrides for all variants.
        command: the user's command, such as "fedpress sweep digits", noted in every run.

    Yields:
        `VariantStarted` and `VariantFinished` for each variant.

    Raises:
        RunError: if another process works in the folder of the sweep.
    """
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    with lock.locked(place):
        yield from _variants(text, todo, place, extra, command)


def _variants(
    text: str, todo: Sequence[Variant], place: Path, extra: Sequence[str], command: str
) -> Iterator[VariantStarted | VariantFinished]:
    loaded: dict[str, FederatedData] = {}
    done: list[tuple[Variant, Path, FedpressError | None]] = []
    earlier: list[tuple[list[str], RunFolder]] = []
    taken: set[Path] = set()
    for variant in todo:
        # The same order of variants gives the same folders, so that a repeated sweep resumes its
        # runs.
        path = _free(place / "variants", variant.name, taken)
        error: FedpressError | None = None
        try:
            overrides = [*variant.overrides, *extra]
            recipe = recipes.load(text, overrides)
            own = recipes.write(recipes.tree(text, overrides))
            settings = settings_of(recipe)
            if (path / "settings.json").exists():
                folder = RunFolder.resume(path, settings)
            else:
                RunFolder.check_free(path, own)
                folder = RunFolder.create(path, own, settings)
            # Variants with equal data settings share one loaded data set. Only the last is kept,
            # so that memory does not grow with the number of variants.
            key = f"{recipe.data.model_dump_json()} {derive(recipe.seed, 'data')}"
            if key not in loaded:
                loaded = {key: load_data(recipe)}
            # All stages are checked first, so that a mistake in the last stage does not cost a
            # whole run.
            check_recipe(recipe, loaded[key], sizes=False)
            notes = write_environment(folder, command, device=device_of(recipe))
            keys = stage_keys(recipe, folder.streams)
            reuse = _nearest(recipe, keys, earlier)
            earlier.append((keys, folder))
            yield VariantStarted(
                variant, runs.execute(recipe, folder, loaded[key], reuse=reuse), tuple(notes)
            )
            # The variant is unfinished if the caller did not iterate to the end.
            if not read_json(path / "result.json").get("finished"):
                raise RunError(
                    "the caller stopped before the last event, so the variant is not finished",
                    place=path,
                    cure="run the same sweep again, which resumes the variant",
                )
        # One combination that fails must not stop the sweep.
        except FedpressError as failure:
            # The frames of the traceback would keep the variant's model and data in memory.
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
            error = failure
        done.append((variant, path, error))
        _write(place, done, command)
        yield VariantFinished(variant, error)


def _free(folder: Path, name: str, taken: set[Path]) -> Path:
    # Values may have characters that are not allowed in file names, or be too long.
    plain = re.sub(r"[^\w.=+-]+", "_", name)[:MAX_FOLDER_NAME].strip("_.") or "variant"
    path, number = folder / plain, 1
    while path in taken:
        number += 1
        path = folder / f"{plain}-{number}"
    taken.add(path)
    return path


def _nearest(
    recipe: Recipe, keys: Sequence[str], earlier: Sequence[tuple[list[str], RunFolder]]
) -> RunFolder | None:
    """Returns the earlier run from which the most stages can be copied.

    Args:
        recipe: the recipe of the next variant.
        keys: for each stage of this variant a hash (see `stage_keys`).
        earlier: the hashes and the folder of each earlier run.

    Returns:
        The folder of the run; None if no run has finished an equal first stage.
    """

    def common(others: Sequence[str], folder: RunFolder) -> int:
        pairs = [*zip(recipe.stage, keys, others, strict=False)]
        for at, (stage, key, other) in enumerate(pairs):
            if key != other or folder.stage(at, stage.kind, stage.name).finished(key) is None:
                return at
        return len(pairs)

    best = max(
        ((common(others, folder), at) for at, (others, folder) in enumerate(earlier)),
        default=(0, 0),
    )
    return earlier[best[1]][1] if best[0] else None


def _shown(stage: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a stage's results that `sweep.json` contains."""
    metric = task_of(stage).primary
    keys = ("kind", "name", "task", metric, f"{metric}_error", *COPIED_KEYS)
    return {key: stage[key] for key in keys if key in stage}


def _write(
    place: Path, done: Sequence[tuple[Variant, Path, FedpressError | None]], command: str
) -> None:
    entries = []
    for variant, path, error in done:
        result = (
            read_json(path / "result.json") if (path / "result.json").exists() else {"stages": []}
        )
        stages = [_shown(stage) for stage in result["stages"]]
        entries.append(
            {
                "name": variant.name,
                "overrides": list(variant.overrides),
                "folder": str(path.relative_to(place)),
                "error": None if error is None else str(error),
                "stages": stages,
            }
        )
    page: dict[str, Any] = {
        "command": command,
        "environment": environment(command),
        "variants": entries,
    }
    for cost in ("file_bytes", "latency_ms"):
        page[f"front_{cost}"] = front(page, cost)
    write_json(place / "sweep.json", page)


def front(page: dict[str, Any], cost: str) -> list[str]:
    """Returns the names of the variants on the Pareto front of the main metric against a cost.

    Latencies of different runtimes are not comparable, so each runtime has a front of its own.

    Args:
        page: the content of `sweep.json`.
        cost: "file_bytes" or "latency_ms", of the last stage.
    """
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for variant in page["variants"]:
        if variant["error"] or not variant["stages"]:
            continue
        name, stage = variant["name"], variant["stages"][-1]
        if stage.get(cost) is not None and stage.get(task_of(stage).primary) is not None:
            runtime = str(stage.get("runtime")) if cost == "latency_ms" else ""
            groups.setdefault(runtime, []).append((name, stage))
    found: list[str] = []
    for known in groups.values():
        points = [(stage[cost], _worth(stage)) for _, stage in known]
        found += [known[at][0] for at in pareto(points)]
    return found


def _worth(stage: dict[str, Any]) -> float:
    """Returns the task's main metric; negated if lower is better, so that higher is better."""
    task = task_of(stage)
    value = float(stage[task.primary])
    return value if task.higher_is_better else -value


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the positions of the Pareto-optimal points (cost, value), by rising cost.

    A point is not optimal if another point is at least as good in both numbers and better in at
    least one (a low cost and a high value are good). Points with NaN are left out. The time is
    O(n log n) (Kung et al. 1975).

    >>> pareto([(2.0, 0.9), (1.0, 0.8), (3.0, 0.85)])
    [1, 0]
    """
    # After sorting by cost, a point is on the front if its value is higher than the values of all
    # cheaper points. Of points with equal costs, the highest value comes first.
    order = [at for at, pair in enumerate(points) if not any(math.isnan(x) for x in pair)]
    order.sort(key=lambda at: (points[at][0], -points[at][1]))
    kept: list[int] = []
    for at in order:
        # Two equal points do not dominate each other, so both are kept.
        if not kept or points[at][1] > points[kept[-1]][1] or points[at] == points[kept[-1]]:
            kept.append(at)
    return kept
