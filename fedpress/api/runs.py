"""Defines `fedpress.run`, `check`, `report` and the class `Run`: checks, runs, resumes recipes.

A recipe is a TOML file with the settings of a run: data, model and stages, such as "train" and
"prune". A run writes its results and checkpoints to its own folder, the run folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpress import storage
from fedpress.api import begin, shown
from fedpress.api.begin import Source
from fedpress.api.drawing import draw_data
from fedpress.api.progress import show
from fedpress.core import consent
from fedpress.data import FederatedData
from fedpress.errors import RunError, Shell
from fedpress.models import memory
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.commands.chosen_data import table_of
from fedpress.pipeline.recipe import Override, Recipe
from fedpress.pipeline.start import load_data
from fedpress.reports.detail_tables import progress_table
from fedpress.reports.html import write_report
from fedpress.reports.reading import read_run
from fedpress.reports.stage_table import stage_table
from fedpress.reports.table import Table
from fedpress.transport.engine import EngineSettings, engine_settings, open_engine
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import Event

Data = str | Path | Mapping[str, Any] | FederatedData | None
"""Data for a recipe: its path, keys of the table `[data]`, or a data set in memory."""
Engine = str | Mapping[str, Any]
"""Where simulated clients run: "local", "ray", or `{"kind": "ray", "actors": 4}`."""


@dataclass(frozen=True)
class Work:
    """The inputs of `Run.events`, all loaded and checked.

    Attributes:
        begun: the checked settings of the run, and its folder.
        data: the loaded data set.
        reuse: another run. Its finished stages are copied in order, until one has other settings.
        engine: where simulated clients run, such as "local" (in this process).
        in_memory: whether the data were given in memory, and not read by the recipe's source.
    """

    begun: begin.CheckedRun
    data: FederatedData
    reuse: RunFolder | None
    engine: EngineSettings
    in_memory: bool


class Run:
    """A run in its folder, finished or not.

    `fedpress.run` returns a finished `Run`. `Run.begin` only checks everything; iterating over
    `events` then runs the stages:

    >>> import fedpress, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> few = {"federate": {"num_rounds": 1}}
    >>> run = fedpress.Run.begin("digits", out=f"{folder}/run", stage=few)
    >>> events = run.events()
    >>> next(events)
    StageStarted(index=0, kind='train', name='dense', reused=False)
    >>> events.close()  # all work up to the last checkpoint is saved; `Run.resume` continues

    Attributes:
        path: the run folder.
        recipe: the checked settings; None after `Run.open`.
    """

    def __init__(self, path: Path, work: Work | None = None) -> None:
        self.path = path
        self.recipe: Recipe | None = work.begun.recipe if work is not None else None
        self._work = work

    @classmethod
    def begin(
        cls,
        recipe: Source,
        *,
        data: Data = None,
        out: str | Path | None = None,
        reuse: str | Path | None = None,
        engine: Engine = "auto",
        allow_code: Collection[str] | str = (),
        **overrides: Any,
    ) -> Run:
        """Checks all stages of a new run without running them. For arguments see `fedpress.run`."""
        # Allowed until the process ends, because `events` builds models after this method returns.
        consent.allow(*consent.checked(allow_code))
        words, path, held = _overrides_and_data(data, overrides)
        place = Path(out) if out is not None else None
        # Checked first: a wrong engine must not cost the time to load the data.
        settings = engine_settings(engine)
        begun = begin.new(recipe, words, path, place)
        return cls(begun.place, _bound(begun, held, reuse, settings))

    @classmethod
    def resume(
        cls,
        path: str | Path,
        recipe: Source | None = None,
        *,
        data: Data = None,
        engine: Engine = "auto",
        allow_code: Collection[str] | str = (),
        **overrides: Any,
    ) -> Run:
        """Checks an interrupted run; `events` then continues from its last checkpoint.

        Args:
            path: the run folder.
            recipe: the recipe of the run. Settings that differ from those of the run are an error.
                None: `recipe.toml` in the run folder.
            data: new path of the data, if they have moved. A data set in memory must be given
                again.
            engine: see `fedpress.run`. The engine may change; the result stays the same.
            allow_code: functions that may be called to build models, as `module:function`.
            overrides: settings that may change in a resumed run, such as `device`.

        Raises:
            RunError: if there is no run, its settings differ, or one of its files is damaged.
        """
        consent.allow(*consent.checked(allow_code))
        settings = engine_settings(engine)
        words, where, held = _overrides_and_data(data, overrides)
        # The lock is released after the check, because `events` may be called much later or never.
        with ExitStack() as stack:
            begun = begin.checked_resume(Path(path), recipe, words, where, stack)
        return cls(begun.place, _bound(begun, held, None, settings))

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Opens a run folder to read results; the returned `Run` cannot be continued.

        Raises:
            RunError: if there is no run.
        """
        return cls(RunFolder.open(Path(path)).path)

    def events(self) -> Iterator[Event]:
        """Runs the stages; yields `StageStarted`, `Tick` (a step is done) and `StageFinished`.

        The run works only while the caller requests the next event. A second call continues from
        the last checkpoint and skips finished stages. Torch's random state is restored before each
        event is yielded, so the caller's random numbers do not depend on the run.

        Raises:
            RunError: if this `Run` was made by `open`, or another process works in the folder.
            FedpressError: if a stage fails. Finished stages and checkpoints are kept.
        """
        if self._work is None:
            raise RunError(
                "it was opened for reading only",
                place=self.path,
                cure="open it with fedpress.Run.resume(PATH) to continue it",
            )
        work = self._work
        # Holds the folder's lock until the generator ends or is closed.
        with ExitStack() as held:
            folder, notes = work.begun.start(
                "fedpress.run(...)", held, work.data, in_memory=work.in_memory
            )
            # A second call of `events` must continue in this folder and not make a new one.
            self._work = replace(work, begun=replace(work.begun, folder=folder))
            for note in notes:
                warnings.warn(note, stacklevel=2)
            engine = held.enter_context(open_engine(work.engine))
            yield from own_random_numbers(
                runs.execute(work.begun.recipe, folder, work.data, reuse=work.reuse, engine=engine)
            )
        # Only a finished run gets here. If the caller stops early, the generator ends at `yield`.
        write_report(self.path)

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return read_run(self.path).finished

    @property
    def result(self) -> dict[str, Any]:
        """The content of `result.json`: "stages" has facts of each stage, "final" of the last one.

        Raises:
            RunError: if the run is not finished.
        """
        found = read_run(self.path)
        if not found.finished:
            raise RunError(
                "this run is not finished",
                place=self.path,
                cure=(
                    "iterate over run.events() to the end, or use fedpress.run(resume=PATH)",
                    Shell(" or --resume"),
                ),
            )
        return found.result

    @property
    def stages(self) -> list[dict[str, Any]]:
        """Facts of each finished stage, such as `accuracy` and `parameters`."""
        # Read again at each use, since the run may have advanced in this or another process.
        return read_run(self.path).stages

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record for each epoch or round that is done, such as its loss and accuracy."""
        return read_run(self.path).records

    @property
    def model(self) -> nn.Module:
        """The model of the last finished stage.

        Raises:
            ModelError: if no stage is finished.
        """
        spec, model = storage.load(self.path)
        # With its spec, the module can be given to `fedpress.prune` and saved again.
        memory.remember_spec(model, spec)
        return model

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the report as an HTML page to `out` or `report.html`; returns its path."""
        return write_report(self.path, Path(out) if out is not None else None)

    def _table(self) -> Table:
        found = read_run(self.path)
        # An unfinished run has no result yet, so its epochs and rounds are shown.
        if found.result:
            return stage_table(found.result, before=found.before or None)
        return progress_table(found.records)

    def __str__(self) -> str:
        """Returns a table of the stages."""
        return shown.as_text(self._table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Returns the same table for a notebook."""
        return shown.as_html(self._table())


def run(
    recipe: Source | None = None,
    *,
    data: Data = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    reuse: str | Path | None = None,
    engine: Engine = "auto",
    allow_code: Collection[str] | str = (),
    progress: bool | None = None,
    **overrides: Any,
) -> Run:
    """Runs a recipe to its end.

    Args:
        recipe: the name of a recipe that comes with fedpress, a TOML file, a dictionary of tables,
            or a `Recipe`.
        data: folder or file (sets `data.path`), keys of the table `[data]`, or a `FederatedData`
            that replaces the recipe's source of data.
        out: folder of the new run; None: runs/NAME, or runs/NAME-2 and so on if that exists.
        resume: folder of an interrupted run to continue, instead of a new run.
        reuse: folder of another run. Its finished stages are copied in order, until one has other
            settings than in this run.
        engine: where simulated clients run: "local" in this process; "processes" in several, which
            takes `workers`; "ray" in actors of Ray, which takes `address`, `cpus_per_client`,
            `gpus_per_client` and `actors`, as in `{"kind": "ray", "actors": 4}`. "auto" begins in
            this process and starts others if that pays back. It does not change the result.
        allow_code: functions that may be called to build models, as `module:function`. They stay
            allowed in this process.
        progress: whether to show progress bars; None: in a notebook or terminal only.
        overrides: settings to change: `seed=1`, `data={"num_clients": 5}`,
            `stage={"federate": {"num_rounds": 3}}`. A stage is named by its name, kind or position.

    Returns:
        The finished run, with `result`, `model`, `records` and `report()`.

    Raises:
        FedpressError: if settings, data and model do not fit together. Nearly all checks are done
            before the first stage begins.

    >>> import fedpress, tempfile
    >>> quick = {"dense": {"epochs": 1}}
    >>> run = fedpress.run("digits", out=f"{tempfile.mkdtemp()}/run", stage=quick)
    >>> [stage["name"] for stage in run.result["stages"]]
    ['dense', 'prune', 'fine-tune', 'federate', 'export']
    """
    if resume is not None:
        # `out` and `reuse` are for new runs. If they were ignored here, the run could continue in a
        # folder that the user did not mean.
        if out is not None or reuse is not None:
            raise RunError(
                "a resumed run continues in its own folder",
                place="out" if out is not None else "reuse",
                cure="leave it out",
            )
        going = Run.resume(
            resume, recipe, data=data, engine=engine, allow_code=allow_code, **overrides
        )
    elif recipe is None:
        raise RunError("no recipe was given", place="recipe", cure="give its name, file or tables")
    else:
        going = Run.begin(
            recipe,
            data=data,
            out=out,
            reuse=reuse,
            engine=engine,
            allow_code=allow_code,
            **overrides,
        )
    show(going.events(), progress)
    return going


def check(
    recipe: Source,
    *,
    data: Data = None,
    allow_code: Collection[str] | str = (),
    draw: str | Path | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Checks every stage of a recipe without training, and computes what the stages will cost.

    Args:
        recipe: name, file, tables or `Recipe`, as for `fedpress.run`.
        data: path, keys of `[data]` or `FederatedData`, as for `fedpress.run`.
        allow_code: functions that may be called to build models, as `module:function`.
        draw: HTML file that shows the columns of a table and the classes of each client; of public
            rows alone if a stage is private. None: nothing is drawn.
        overrides: settings to change, as for `fedpress.run`.

    Returns:
        "recipe": its name. "data": numbers of clients and examples, and what the columns of a table
        hold (of public rows alone if a stage is private). "stages": parameters and MACs
        of each stage; for federated training also bytes per round, noise multiplier and epsilon.

    Raises:
        FedpressError: the first error that would stop the run, or if there is nothing to draw.

    >>> import fedpress
    >>> stages = fedpress.check("digits")["stages"]
    >>> stages[3]["kind"], stages[3]["epsilon"] <= 8
    ('federate', True)
    """
    consent.allow(*consent.checked(allow_code))
    words, path, held = _overrides_and_data(data, overrides)
    _, checked = begin.load(recipe, words, path)
    # Building models seeds torch's generator. The caller's random numbers must not depend on it.
    with torch.random.fork_rng(devices=[]):
        loaded = held if held is not None else load_data(checked, describe="all")
        lines = check_recipe(checked, loaded)
    if draw is not None:
        draw_data(checked, loaded, Path(draw))
    return {
        "recipe": checked.name,
        "data": loaded.describe(private=checked.private),
        "stages": lines,
    }


def report(run: Run | str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run, finished or not, as an HTML page; returns the path of the page.

    Args:
        run: a `Run`, or the path of a run folder.
        out: file to write; None: `report.html` in the run folder.

    Raises:
        RunError: if there is no run.

    >>> import fedpress, tempfile
    >>> run = fedpress.Run.begin("digits", out=f"{tempfile.mkdtemp()}/run")
    >>> for event in run.events():
    ...     if isinstance(event, fedpress.StageFinished):
    ...         break  # after the first stage
    >>> fedpress.report(run).name
    'report.html'
    """
    return (run if isinstance(run, Run) else Run.open(run)).report(out)


def own_random_numbers(events: Iterator[Event]) -> Iterator[Event]:
    """Yields `events`; gives the run and the caller separate states of torch's random generator.

    Otherwise a caller that draws random numbers between two events would change the run's result.
    """
    state = torch.get_rng_state()
    while True:
        theirs = torch.get_rng_state()
        torch.set_rng_state(state)
        try:
            event = next(events, None)
        finally:  # also if a stage fails
            state = torch.get_rng_state()
            torch.set_rng_state(theirs)
        if event is None:
            return
        yield event


def _overrides_and_data(
    data: Data, overrides: Mapping[str, Any]
) -> tuple[list[Override], Path | None, FederatedData | None]:
    """Returns all overrides, the path of the data, and the data set in memory.

    The type of `data` decides: keys of `[data]` are added to the overrides; a path or a data set is
    returned as such. Path and data set are None if they are not given.
    """
    words = recipes.overrides_of(overrides)
    if isinstance(data, FederatedData):
        # A recipe must name a source. This table says only the shape and the number of classes.
        return [*words, Override.of("data", table_of(data))], None, data
    if isinstance(data, Mapping):
        return [*words, *recipes.overrides_of({"data": data})], None, None
    return words, Path(data) if data is not None else None, None


def _bound(
    begun: begin.CheckedRun,
    held: FederatedData | None,
    reuse: str | Path | None,
    engine: EngineSettings,
) -> Work:
    """Loads the data and checks every stage; returns all that `Run.events` needs."""
    earlier = RunFolder.open(Path(reuse)) if reuse is not None else None
    with torch.random.fork_rng(devices=[]):
        data = held if held is not None else load_data(begun.recipe)
        check_recipe(begun.recipe, data, sizes=False)
    return Work(begun, data, earlier, engine, in_memory=held is not None)
