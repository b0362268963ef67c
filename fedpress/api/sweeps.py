"""A sweep: a recipe for all combinations of some values, with the variants that no other beats."""

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
        variants: the combinations.
        place: the folder of the sweep.
        extra: overrides of all variants, as text.
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
    """Binds a sweep.

    Args:
        recipe: as `begin.load` takes it.
        values: such as `stage.prune.keep_params=0.5,0.3`.
        seeds: for mean and spread.
        overrides: of all variants.
        data: where the data lie.
        out: the folder; by default sweeps/NAME.

    Raises:
        RecipeError: if a key or value is wrong.
    """
    variants = sweeping.variants(values, seeds)
    # Checked with what all variants say: a key that the recipe lacks may be given behind it.
    every = [*sweeping.in_all(variants), *overrides]
    text, checked = begin.load(recipe, every, data)
    device_of(checked)  # one refusal in place of one for each variant
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
    """Runs a recipe for all combinations of values; stages that are equal in several are done once.

    Args:
        recipe: as `fedpress.run` takes it.
        values: key -> its values, such as `{"stage.prune.keep_params": [0.5, 0.3]}`.
        seeds: for mean and spread.
        data: where the data lie.
        out: the folder, by default sweeps/NAME. A sweep that is there goes on.
        allow_code: names `module:function` that files of models may have called, from now on in
            this process.
        progress: whether to show bars, see `fedpress.run`.
        overrides: keys of the recipe, in all variants.

    Returns:
        `sweep.json` of the folder: under "variants" the stages of each, or its error; under
        "front_file_bytes" and "front_latency_ms" the variants that no other beats.

    Raises:
        RecipeError: if a key or value is wrong. A variant that fails later is noted, and the others
            go on.

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
    lists = [f"{key}={','.join(map(recipes.in_one_line, some))}" for key, some in values.items()]
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
    write_sweep(begun.place)
    return read_json(begun.place / "sweep.json")
