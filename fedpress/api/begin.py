"""Checks a recipe and its overrides, and creates the folder of a new run or opens an existing one.

A recipe is a TOML file with the settings of a run. An override changes one of these settings:
`stage.2.num_rounds=5`. The run folder gets the results and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.core import consent, own_modules
from fedpress.data import FederatedData
from fedpress.errors import Argument, ModelError, RunError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.environment import write_environment
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.recipe import Override, Recipe
from fedpress.pipeline.result import read_finished
from fedpress.pipeline.start import device_of
from fedpress.workspace import fingerprint, lock, started
from fedpress.workspace.atomic import read_json
from fedpress.workspace.damage import check_run
from fedpress.workspace.folder import RunFolder

Source = str | Path | Mapping[str, Any] | Recipe
"""A recipe: the name of a shipped recipe, a TOML file, a dictionary of tables, or a `Recipe`."""

Overrides = Sequence[str | Override]
"""Changes of settings, each as text such as "stage.2.num_rounds=5" or as an `Override`."""


def default_folder(name: str, resume: bool) -> Path:
    """Returns the folder that follows the last existing one of `runs/NAME`, `runs/NAME-2`, ...

    If `resume`, returns the last existing one. If none exists, returns `runs/NAME` in both cases.
    """
    numbered = [
        Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000)
    ]
    taken = [path for path in numbered if path.exists()]
    if resume:
        return taken[-1] if taken else numbered[0]
    return numbered[numbered.index(taken[-1]) + 1] if taken else numbered[0]


def load(recipe: Source, overrides: Overrides = (), data: Path | None = None) -> tuple[str, Recipe]:
    """Returns a recipe with its overrides applied: as TOML text, and as checked settings.

    The paths in the text are absolute, so a run can be resumed from another current folder.

    Args:
        recipe: the recipe. Paths in a TOML file are relative to the folder of that file; paths in a
            dictionary or `Recipe` are relative to the current folder.
        overrides: changes such as `stage.2.num_rounds=5`. Paths in them are relative to the current
            folder.
        data: file or folder of the data; sets `data.path`.

    Raises:
        RecipeError: if there is no such recipe, or a setting is wrong.
    """
    overrides = [*overrides, *_data_override(data)]
    if isinstance(recipe, Mapping | Recipe):
        find_modules()
        tables = (
            # Defaults are left out, so that the TOML in the run folder shows only what the user
            # has set.
            recipe.model_dump(mode="json", exclude_unset=True)
            if isinstance(recipe, Recipe)
            else dict(recipe)
        )
        return recipes.from_tables(tables, overrides)
    text = recipes.find(str(recipe))
    file = _file_of(recipe)
    folder = file.parent if file is not None else None
    # A recipe may name functions, such as `nets:small`, of a file beside it.
    find_modules(*([folder] if folder is not None else []))
    # Checked before paths are resolved: `effective` writes new TOML, but errors must name lines of
    # the user's file.
    recipes.load(text, overrides)
    text = recipes.effective(text, overrides, folder=folder)
    return text, recipes.load(text)


@dataclass(frozen=True)
class CheckedRun:
    """A new or resumed run whose settings were checked.

    Attributes:
        recipe: the checked settings.
        text: `recipe` as TOML; "" for a resumed run, since its folder contains the text.
        place: path of the run folder.
        folder: the opened folder of a resumed run; None for a new run, whose folder does not exist
            yet.
        origin: path or name of the recipe, and the overrides (see `origin_of`).
    """

    recipe: Recipe
    text: str
    place: Path
    folder: RunFolder | None
    origin: Mapping[str, Any]

    def start(
        self, command: str, stack: ExitStack, data: FederatedData, *, in_memory: bool = False
    ) -> tuple[RunFolder, list[str]]:
        """Creates the folder of a new run; writes or extends `environment.json`.

        This file says with which command, versions and processor the run was started. The file
        `data.json` says with which data; a resumed run is compared with it.

        Args:
            command: the user's command, for `environment.json`.
            data: the loaded data.
            in_memory: whether the data were given in memory, in the place of the recipe's source.
            stack: gets the lock of a new folder, and releases it when it is closed. The folder of a
                resumed run is not locked here.

        Returns:
            The folder, and warnings about a resumed run, for example that its results will not be
            equal bit by bit to those of an uninterrupted run.

        Raises:
            RunError: if a run that is not finished is resumed with other data.
        """
        folder, notes = self.folder, list[str]()
        settings = None if in_memory else self.recipe.data
        if folder is None:
            # Before the folder is made: a file may have become unreadable.
            now = fingerprint.seen(data, settings)
            folder = RunFolder.create(self.place, self.text, settings_of(self.recipe))
            # From here on no second process can write to this folder.
            stack.enter_context(folder.locked())
            fingerprint.note(folder.path, now)
        elif not read_finished(folder):
            notes = fingerprint.compare(folder.path, fingerprint.seen(data, settings), settings)
        device = device_of(self.recipe)
        notes += write_environment(folder, command, self.origin, device=device)
        return folder, notes


def new(recipe: Source, overrides: Overrides, data: Path | None, out: Path | None) -> CheckedRun:
    """Checks the settings of a new run, and that the run would replace no files in its folder.

    Nothing is written, not even an empty folder.

    Raises:
        RecipeError: if there is no such recipe, or a setting is wrong.
        RunError: if the folder contains files that the run might replace.
    """
    text, checked = load(recipe, overrides, data)
    place = out or default_folder(checked.name, False)
    RunFolder.check_free(place, text)
    return CheckedRun(checked, text, place, None, origin_of(recipe, overrides, data))


def checked_resume(
    place: Path,
    recipe: Source | None,
    overrides: Overrides,
    data: Path | None,
    stack: ExitStack,
) -> CheckedRun:
    """Checks that the run in the folder `place` may be resumed; see `open_to_resume`."""
    checked, folder = open_to_resume(place, recipe, overrides, data, stack)
    return CheckedRun(checked, "", place, folder, origin_of(recipe, overrides, data))


def origin_of(recipe: Source | None, overrides: Overrides, data: Path | None) -> dict[str, Any]:
    """Returns "recipe" and "overrides" as the user gave them, for `environment.json`.

    Paths are absolute, since the run may be resumed from another folder. "recipe" is None if the
    recipe was not given, or was given as a dictionary or as a `Recipe`.
    """
    file = _file_of(recipe) if isinstance(recipe, str | Path) else None
    name = recipe if isinstance(recipe, str) else None
    return {
        "recipe": str(file) if file is not None else name,
        "overrides": as_texts(overrides, data.resolve() if data is not None else None),
    }


def as_texts(overrides: Overrides, data: Path | None) -> list[str]:
    """Returns overrides and the path of the data as text, such as `data.path=/data/cifar`."""
    all_overrides = [*overrides, *_data_override(data)]
    return [one if isinstance(one, str) else one.as_text() for one in all_overrides]


def _file_of(recipe: str | Path) -> Path | None:
    """Returns the absolute path of a recipe file.

    Returns None for a recipe that comes with fedpress, or if there is no such file.
    """
    # A recipe that comes with fedpress is preferred to a file of the same name in the current
    # folder, as in `recipes.find`.
    if str(recipe) in recipes.names() or not Path(recipe).is_file():
        return None
    return Path(recipe).resolve()


def _data_override(data: Path | None) -> list[Override]:
    return [Override.of("data.path", str(data))] if data is not None else []


def open_to_resume(
    place: Path,
    recipe: Source | None,
    overrides: Overrides,
    data: Path | None,
    stack: ExitStack,
) -> tuple[Recipe, RunFolder]:
    """Opens the run in `place` to resume it.

    Args:
        place: the folder of the run.
        recipe: the recipe that the run was started with; None: `recipe.toml` in the run folder.
        overrides: further overrides. They may change only keys that a resumed run may change, such
            as `device`.
        data: new path of the data, if they have moved.
        stack: gets the lock of the folder, and releases it when it is closed.

    Raises:
        RunError: if there is no run, another process works in the folder, a file is damaged or
            missing, or the run was started with other settings.
        ModelError: if `recipe` is None, `recipe.toml` names functions that are not allowed, and no
            signature shows that this user has started the run.
    """
    if not (place / "settings.json").exists():
        raise RunError(
            "there is no run to resume",
            place=place,
            cure=("give a recipe and leave out ", Argument("resume"), " to start one"),
        )
    # Locked before anything is read: another process could still change these files.
    stack.enter_context(lock.locked(place))
    check_run(place)
    noted = read_json(place / "environment.json") if (place / "environment.json").exists() else {}
    stored_file = place / "recipe.toml"
    if not stored_file.exists() and recipe is None:
        raise RunError(
            "no such file",
            place=stored_file,
            cure="name the recipe that the run was started with",
        )
    _find_its_functions(stored_file, noted, trusted=recipe is not None)

    stored = None
    if stored_file.exists():
        all_overrides = [*overrides, *_data_override(data)]
        stored = recipes.load(recipes.effective(stored_file.read_text("utf-8"), all_overrides))
    if recipe is None:
        assert stored is not None
        return stored, RunFolder.resume(place, settings_of(stored))

    wanted = load(recipe, overrides, data)[1]
    settings = RunFolder.open(place).settings
    if settings_of(wanted) != settings and noted.get("overrides"):
        # The user may have left out the overrides given at the start. The folder contains them.
        wanted = load(recipe, [*map(str, noted["overrides"]), *overrides], data)[1]
    folder = RunFolder.resume(place, settings_of(wanted))
    # The stored recipe is preferred if its settings are equal: its paths are absolute.
    if stored is not None and settings_of(stored) == settings:
        return stored, folder
    return wanted, folder


def _find_its_functions(recipe: Path, noted: Mapping[str, object], *, trusted: bool) -> None:
    """Makes a resumed run's functions importable, if this user has started the run.

    The functions are those that its recipe names, such as `nets:small` in a file beside the recipe.

    Args:
        recipe: `recipe.toml` in the run folder; it may be missing.
        noted: the content of `environment.json` of the run. `started_by` in it is a signature over
            the recipe's path and functions, made with a key of the user on this machine.
        trusted: whether the user has named a recipe. This is consent to the functions in it.

    Raises:
        ModelError: if `recipe.toml` names functions that are not allowed, and no signature shows
            that this user has started the run.
    """
    functions = started.functions_of(recipe.read_text("utf-8")) if recipe.exists() else []
    noted_recipe = noted.get("recipe")
    origin = noted_recipe if isinstance(noted_recipe, str) else None
    started_here = started.is_signed(noted.get("started_by"), functions, origin)
    # Without a signature the origin is not trusted: it may be a folder with modules of a stranger.
    beside = [Path(origin).parent] if started_here and origin else []
    find_modules(*(folder for folder in beside if folder.is_dir()))
    if not (trusted or started_here):
        _refuse_functions(recipe, functions)


def _refuse_functions(recipe: Path, functions: list[str]) -> None:
    """Refuses a recipe in a run folder of unknown origin if it names functions not yet allowed.

    Raises:
        ModelError: names the functions, and says how to allow them.
    """
    arguments = [name for name in functions if not consent.allowed(name)]
    if arguments:
        raise ModelError(
            (
                f"it names {', '.join(map(repr, arguments))[:200]}, which would be called, and "
                "no signature shows that you started this run on this machine"
            ),
            place=recipe,
            cure=(
                "nothing was loaded. If you know that code and trust the folder, add ",
                Argument("allow_code", tuple(arguments)),
                ", or name your own recipe file beside ",
                Argument("resume"),
            ),
        )


def find_modules(*beside: Path) -> None:
    """Makes the user's modules importable from the folders `beside` and from the current folder."""
    own_modules.set_folders(*beside, Path.cwd())
