"""The commands `eval`, `predict` and `save`, which use a model without changing it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpress.cli.common import AllowCode, AsJson, Device, allow_code, in_one_line, stopping
from fedpress.cli.one_model import (
    DataPath,
    Input,
    Mean,
    Source,
    Std,
    Weights,
    numbers_of,
    shape_of,
)
from fedpress.errors import DataError

if TYPE_CHECKING:
    from fedpress.api.evaluating import Predictions

GivenModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model's or run's folder, a packed or exported file, or module:function.",
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of this file to `app`."""
    # The name is given here, because a function named `eval` would hide Python's own `eval`.
    app.command(name="eval")(evaluate)
    app.command()(predict)
    app.command()(save)


def evaluate(
    model: GivenModel,
    data: Source = None,
    path: DataPath = None,
    checkpoint: Weights = None,
    mean: Mean = None,
    std: Std = None,
    task: Annotated[
        str | None, typer.Option(help="Task, such as binary; by default that of the data.")
    ] = None,
    device: Device = None,
    code: AllowCode = None,
    as_json: AsJson = False,
) -> None:
    """Measures a model on test data; by default on those of the run that wrote the model."""
    from fedpress.cli import terminal

    allow_code(code)
    out_stream = terminal.console(quiet=as_json)
    with stopping("stopped"), terminal.waiting(out_stream, "measuring"):
        from fedpress.api import begin, evaluating

        begin.find_modules()
        found = evaluating.evaluate(
            model,
            data,
            path=path,
            checkpoint=checkpoint,
            mean=numbers_of(mean),
            std=numbers_of(std),
            task=task,
            device=device,
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    # Values that do not fit into a line, such as lists, are shown with `--json` only.
    for key, value in found.items():
        if isinstance(value, int | float | str):
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            out_stream.print(f"{key:20} {shown}", markup=False)


def predict(
    model: GivenModel,
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="INPUTS",
            help="Raw rows (.csv, .parquet), a text (.txt), a recording (.wav), an image or a folder "
            "of these; or a file of NumPy: .npy, .npz for several inputs.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv file, or .npy for the outputs (of several, the answers); by default CSV."
        ),
    ] = None,
    checkpoint: Weights = None,
    mean: Mean = None,
    std: Std = None,
    unknown: Annotated[
        str,
        typer.Option(
            metavar="error|zeros",
            help="What a word does that the training did not know: error, or zeros as in training.",
        ),
    ] = "error",
    tokens: Annotated[
        int, typer.Option(help="How many tokens continue a text, for a language model.")
    ] = 20,
    code: AllowCode = None,
) -> None:
    """Runs a model on raw data or prepared examples, and prints a CSV row for each."""
    # Checked first, so that a wrong name fails before the model runs.
    if out is not None and out.suffix not in (".csv", ".npy"):
        raise DataError(
            f"got '{out}'", place="out", cure="give a file that ends in .csv or in .npy"
        )
    allow_code(code)
    from fedpress.api import begin, evaluating

    begin.find_modules()
    found = evaluating.predict(
        model,
        inputs,
        checkpoint=checkpoint,
        mean=numbers_of(mean),
        std=numbers_of(std),
        unknown=unknown,  # type: ignore[arg-type]  # checked there, by one sentence
        tokens=tokens,
    )
    if found.ignored:
        listed = ", ".join(found.ignored)
        typer.echo(in_one_line(f"note: these columns are not used: {listed}"), err=True)
    _write(found, out)


def _write(found: Predictions, out: Path | None) -> None:
    """Writes predictions as CSV, or their outputs as .npy; without a file they are printed."""
    from fedpress.core.files import replacing

    if out is not None and out.suffix == ".npy":
        import numpy as np

        # Through a temporary file, so that an interrupted command leaves no half file.
        with replacing(out) as temporary, open(temporary, "wb") as binary:
            np.save(binary, found.array.numpy())
        return
    header, rows = found.table()
    if out is None:
        # The csv module ends lines with CR LF, which a Unix terminal does not expect.
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([header, *rows])


def save(
    model: GivenModel,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A new folder, or a new file .safetensors.")
    ],
    checkpoint: Weights = None,
    input_shape: Input = None,
    code: AllowCode = None,
) -> None:
    """Saves a model as a folder or as one packed file; every other command can open both."""
    allow_code(code)
    from fedpress.api import begin, saving

    begin.find_modules()
    saving.save(model, path, checkpoint=checkpoint, input_shape=shape_of(input_shape))
    typer.echo(path)
