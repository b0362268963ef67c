"""Defines `fedpress.sweep`: runs a recipe with all combinations of values, finds Pareto fronts.

A recipe is a TOML file with the settings of a run. A variant is the recipe with one combination of
the values, such as `keep_params=0.5` with seed 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.api import begin
from fedpress.api.begin import Overrides, Source
from fedpress.api.progress import show
from fedpress.core import consent
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import sweep as sweeping
from fedpress.pipeline.start import device_of
from fedpress.reports.sweep import write_sweep
from fedpress.workspace.atomic import read_json


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep whose settings were checked.

    Attributes:
        text: the recipe as TOML.
        variants: all combinations of the values, with each seed.
        place: folder of the sweep; it gets one run folder per variant.
        extra: further overrides that every variant gets, as text such as `seed=1`.
    """

    text: str
    variants: list[sweeping.Variant]
    place: Path
    extra: list[str]


def new(
    recipe: Source,
    values: Sequence[str],
    seeds: Sequence[int] = (),
    overrides: Overrides = (),
    data: Path | None = None,
    out: Path | None = None,
) -> CheckedSweep:
    """Checks the settings of a sweep; runs nothing.

    Args:
        recipe: the recipe, as for `begin.load`.
        values: values of keys, such as `stage.prune.keep_params=0.5,0.3`.
        seeds: seeds to run each combination with; (): the recipe's own seed.
        overrides: further overrides that every variant gets.
        data: file or folder of the data.
        out: folder of the sweep; None: sweeps/NAME.

    Raises:
        RecipeError: if a key or value is wrong.
    """
    variants = sweeping.variants(values, seeds)
    # Overrides that all variants share are applied before the check, because one of them may set a
    # key that the recipe needs and lacks.
    every = [*sweeping.common_overrides(variants), *overrides]
    text, checked = begin.load(recipe, every, data)
    # A missing device raises an error here. Otherwise every variant would fail with that error.
    device_of(checked)
    extra = begin.as_texts(overrides, data)
    return CheckedSweep(text, variants, out or Path("sweeps") / checked.name, extra)


def sweep(
    recipe: Source,
    values: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int] = (),
    data: str | Path | None = None,
    out: str | Path | None = None,
    allow_code: Collection[str] | str = (),
    progress: bool | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Runs a recipe for all combinations of values; stages with equal settings run only once.

    Args:
        recipe: the recipe, as for `fedpress.run`.
        values: key -> values to try, such as `{"stage.prune.keep_params": [0.5, 0.3]}`.
        seeds: seeds to run each combination with, for mean and standard error.
        data: file or folder of the data.
        out: folder of the sweep; None: sweeps/NAME. An interrupted sweep there is resumed.
        allow_code: functions that may be called to build models, as `module:function`. They stay
            allowed in this process.
        progress: whether to show progress bars; None: in a notebook or terminal only.
        overrides: settings to change in all variants, such as `seed=1`.

    Returns:
        The content of `sweep.json`. "variants": the stages of each variant, or its error.
        "front_file_bytes": names of the variants on the Pareto front of metric and file size.
        "front_latency_ms": the same for metric and latency.

    Raises:
        RecipeError: if a key or value is wrong. If a variant fails later, nothing is raised: its
            error is written to `sweep.json`.

    >>> import fedpress, tempfile
    >>> found = fedpress.sweep(
    ...     "digits",
    ...     {"stage.prune.keep_params": [0.5, 0.4]},
    ...     out=f"{tempfile.mkdtemp()}/sweep",
    ...     stage={"dense": {"epochs": 1}, "federate": {"num_rounds": 1}},
    ... )
    >>> [variant["name"] for variant in found["variants"]]
    ['keep_params=0.5', 'keep_params=0.4']
    """
    consent.allow(*consent.checked(allow_code))
    # As text, like on the command line, so both read keys and values with the same rules.
    lists = []
    for key, key_values in values.items():
        texts = [recipes.in_one_line(value) for value in key_values]
        lists.append(f"{key}={','.join(texts)}")
    begun = new(
        recipe,
        lists,
        seeds,
        recipes.overrides_of(overrides),
        Path(data) if data is not None else None,
        Path(out) if out is not None else None,
    )
    events = sweeping.execute(
        begun.text, begun.variants, begun.place, extra=begun.extra, command="fedpress.sweep(...)"
    )
    for event in events:
        if isinstance(event, sweeping.VariantStarted):
            for note in event.notes:
                warnings.warn(note, stacklevel=2)
            show(event.events, progress)
    # Written last, because the HTML page compares all variants.
    write_sweep(begun.place)
    return read_json(begun.place / "sweep.json")
