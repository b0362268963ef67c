"""Loads any saved model: the folder of a model, the folder of a run, or a packed file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from fedpress.errors import ModelError, Shell
from fedpress.models import ModelSpec, load_model
from fedpress.models.foreign import identify
from fedpress.storage.packed import unpack


def load(path: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Loads a saved model: a folder with spec.json, the folder of a run, or a packed file.

    Of a run it loads the model of the last finished stage.

    Args:
        path: the folder or file.
        allow_code: the function or functions, such as "nets:Net" (`module:function`), that the
            file may name to build its network. Architectures of fedpress, and functions that the
            user of this process has already named, are always allowed.

    Returns:
        The spec (how to build the model), and the model.

    Raises:
        ModelError: if there is no model, if the run has no finished stage, if the model is damaged,
            or if it names a function that is not allowed. If the file comes from another program,
            the error says how to use it here.
    """
    path = Path(path)
    # Files of other programs are recognised first, because opening some (pickles) is dangerous.
    foreign = identify(path)
    if foreign is not None:
        raise ModelError(foreign.what, place="model", cure=foreign.cure)
    if path.is_file():
        return unpack(path, allow_code)
    if (path / "stages").is_dir() and not (path / "spec.json").exists():
        return load_model(_last_stage(path), allow_code)
    return load_model(path, allow_code)


def _last_stage(run: Path) -> Path:
    # Folders are named "3-federate"; a stage has a result.json only when it is finished.
    finished: dict[int, Path] = {}
    for result in (run / "stages").glob("*-*/result.json"):
        number = result.parent.name.split("-")[0]
        if number.isdecimal():
            finished[int(number)] = result.parent
    if not finished:
        raise ModelError(
            "no stage of this run is finished",
            place=run,
            cure=(Shell("resume the run with --resume, or "), "give another model"),
        )
    return finished[max(finished)]
