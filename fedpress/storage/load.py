"""One door for every saved model: the folder of a model, the folder of a run, or a packed file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from fedpress.errors import ModelError, Shell
from fedpress.models import ModelSpec, load_model
from fedpress.models.foreign import described
from fedpress.storage.packed import unpack


def load(path: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Loads a saved model: a folder with spec.json, a run's folder (its last finished stage), or a packed file.

    Args:
        path: of the folder or file.
        allow_code: names `module:function` that the file may have called to build its network, such as "nets:Net".
            Without one only the architectures of fedpress are built, and what this process was given by name.

    Raises:
        ModelError: if there is no model, it is corrupt, it names a function that is not allowed, or it is another
            program's: then how it can be used here.
    """
    path = Path(path)
    if (foreign := described(path)) is not None:
        raise ModelError(foreign.what, place="model", cure=foreign.way)
    if path.is_file():
        return unpack(path, allow_code)
    if (path / "stages").is_dir() and not (path / "spec.json").exists():
        return load_model(_last_stage(path), allow_code)
    return load_model(path, allow_code)


def _last_stage(run: Path) -> Path:
    finished = [
        p.parent
        for p in (run / "stages").glob("*-*/result.json")
        if p.parent.name.split("-")[0].isdecimal()
    ]
    if not finished:
        raise ModelError(
            "no stage of this run is finished",
            place=run,
            cure=(Shell("go on with --resume, or "), "give another model"),
        )
    return max(finished, key=lambda stage: int(stage.name.split("-")[0]))
