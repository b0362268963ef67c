"""Runs the stages of a recipe in order; measures and saves the model after each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fedpress.core.log import logger
from fedpress.core.random import STREAMS
from fedpress.data import FederatedData
from fedpress.data.shown import shown
from fedpress.nn.quantized import kept_entries, materialize_, note_kept_zeros_
from fedpress.pipeline.keys import stage_keys
from fedpress.pipeline.measure import measure, measured_keys
from fedpress.pipeline.places import errors_of_stage
from fedpress.pipeline.recipe import Recipe
from fedpress.pipeline.result import write_result
from fedpress.pipeline.start import completed, first_state, parent_of, with_parent
from fedpress.privacy.ledger import Ledger
from fedpress.stages import inputs
from fedpress.stages.base import Stage
from fedpress.transport.engine import engine_settings, open_engine
from fedpress.workspace import fingerprint
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.stage_folder import Done, StageFolder
from fedpress.workspace.state import (
    Engine,
    Event,
    Network,
    StageFinished,
    StageStarted,
    State,
    Tick,
)

log = logger(__name__)


def execute(
    recipe: Recipe,
    folder: RunFolder,
    data: FederatedData,
    *,
    reuse: RunFolder | None = None,
    network: Network | None = None,
    engine: Engine | None = None,
) -> Iterator[Event]:
    """Runs the stages that are not finished yet, and writes `result.json` after each stage.

    Args:
        recipe: the checked recipe.
        folder: folder of the run.
        data: the loaded data set.
        reuse: folder of another run. Each stage before the first one whose settings differ is
            copied from it, if the other run has finished this stage.
        network: reaches clients on other machines; None: the clients of `data` are simulated.
        engine: runs simulated clients; None: the default engine, "auto". The result is the same for
            every engine.

    Yields:
        Events of the run, such as `StageStarted` and `StageFinished`.

    Raises:
        RunError: if another process works in the folder, or if an unfinished run began with
            another version of the random streams.
        FedpressError: if a stage fails; finished stages and checkpoints are kept.
    """
    with ExitStack() as held:
        held.enter_context(folder.locked())
        if engine is None and network is None:
            engine = held.enter_context(open_engine(engine_settings()))
        first = replace(first_state(recipe, data), network=network, engine=engine)
        inputs.write_preparation(first, folder.path, folder.path)
        yield from _stages(recipe, folder, data, reuse, first)


def _stages(
    recipe: Recipe,
    folder: RunFolder,
    data: FederatedData,
    reuse: RunFolder | None,
    state: State,
) -> Iterator[Event]:
    records = 0
    load = parent_of(recipe, data)
    results: list[dict[str, Any]] = []
    drawn = shown(data, rows="public", clients=not recipe.hides_clients)
    keys = stage_keys(recipe, folder.streams)
    _check_streams(recipe, folder, keys)
    same_data = reuse is None or not fingerprint.differ(folder.path, reuse.path)
    for index, (stage, key) in enumerate(zip(recipe.stage, keys, strict=True)):
        place = folder.stage(index, stage.kind, stage.name)
        # The key is a hash of data, model, seed and all stages up to this one. Equal keys mean
        # equal results, so a finished stage with this key need not run again.
        done = place.finished(key)
        if done is not None:
            log.info("stage %s is finished already", stage.name)
        elif reuse is not None:
            done = place.adopt(reuse.path, key, records=records, same_data=same_data)
            if done is not None:
                log.info("stage %s is taken over from %s", stage.name, reuse.path)
        if done is not None:
            # Run folders of older versions have no checksum: only counting finds a lost record.
            folder.records.check_count(done.records)
        yield StageStarted(index, stage.kind, stage.name, reused=done is not None)
        if done is None:
            log.info("stage %s (%s) begins on %s", stage.name, stage.kind, state.device)
            done = yield from _do(
                stage, replace(state, facts={}), place, key, records, results[-1:]
            )
        # The next stage gets the saved model, not the model in memory. So a resumed run has the
        # same model, bit for bit.
        spec, model = place.load()
        before = state
        state = replace(state, data=completed(state.data, spec))
        if state.data is not before.data:
            inputs.write_preparation(replace(state, spec=spec), folder.path, folder.path)
        # `score` is the main metric of the model. An export stage measures its file and not the
        # model, so the score of the stage before is kept.
        of_model = not (stage.reports_artifact or stage.repeats_measurements)
        score = done.result.get(data.task.primary) if of_model else state.score
        state = replace(state, spec=spec, model=model, ledger=_ledger(done), score=score)
        state, load = with_parent(state, before, load), place.load
        log.info("stage %s has ended after %.1f s", stage.name, done.result["seconds"])
        records = done.records
        results.append(done.result)
        finished = index + 1 == len(recipe.stage)
        left_out = data.left_out_sentence(private=recipe.private)
        # Written after each stage, so that an interrupted run also has a result.
        write_result(recipe, folder, results, finished=finished, left_out=left_out, data=drawn)
        yield StageFinished(index, done.result)


def _check_streams(recipe: Recipe, folder: RunFolder, keys: Sequence[str]) -> None:
    """Refuses to continue a run that began with another version of the random streams.

    Random streams give each part of a run its own random numbers. Another version gives other
    numbers, so the rest of the run would not fit its beginning.

    Raises:
        RunError: if the versions differ and a stage is not finished.
    """
    if folder.streams == STREAMS:
        return
    numbered = enumerate(zip(recipe.stage, keys, strict=True))
    places = ((folder.stage(at, stage.kind, stage.name), key) for at, (stage, key) in numbered)
    folder.check_streams(finished=all(place.finished(key) for place, key in places))


def _do(
    stage: Stage,
    state: State,
    place: StageFolder,
    key: str,
    records: int,
    last: Sequence[dict[str, Any]],
) -> Generator[Event, None, Done]:
    """Runs one stage from its last checkpoint, measures the model, and saves model and results.

    Args:
        stage: the stage.
        state: state before the stage.
        place: folder of the stage.
        key: hash of everything that the result depends on (see `stage_keys`).
        records: number of records that earlier stages have written.
        last: a list with the results of the previous stage; empty for the first stage.
    """
    began, before = time.perf_counter(), place.begin(records)
    with errors_of_stage(place.index, stage):
        state = yield from stage.run(state, place)
    state = _settled(state)
    # `before`: seconds that the stage ran before it was interrupted.
    seconds = before + time.perf_counter() - began
    # A stage with `repeats_measurements` leaves the model as it is, so measuring again would give
    # the same numbers.
    if last and stage.repeats_measurements:
        known = measured_keys(state.data.task)
        measured = {key: value for key, value in last[0].items() if key in known}
    else:
        yield Tick(1, 1, f"measuring on {len(state.data.test):,} test examples")
        measured = measure(state, latency="latency_ms" not in state.facts)
    return place.finish(state.spec, state.model, _line(state, stage, seconds, measured), key=key)


def _settled(state: State) -> State:
    """Rounds quantized weights to their grids, and notes in the spec which weights are pruned.

    During training, weights are floats between the points of the grid. The saved model has the
    rounded weights.
    """
    # This comes before rounding: rounding can turn a small weight that is not pruned into 0.
    kept = kept_entries(state.model, state.spec.sparse if state.spec.quantized else ())
    materialize_(state.model)
    noted = note_kept_zeros_(state.model, kept)
    if noted == state.spec.kept_zeros:
        return state
    return replace(state, spec=state.spec.model_copy(update={"kept_zeros": noted}))


def _ledger(done: Done) -> Ledger | None:
    page = done.result.get("ledger")
    return Ledger.from_json(json.dumps(page)) if page else None


def _line(state: State, stage: Stage, seconds: float, measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of one stage in `result.json`.

    Args:
        state: the state after the stage. `state.facts` holds results of the stage's own, such as
            `epsilon`; they replace measurements of the same name.
        stage: the stage.
        seconds: how long it ran.
        measured: the metrics and costs of the model.
    """
    ledger = {"ledger": json.loads(state.ledger.to_json())} if state.ledger is not None else {}
    line = {"kind": stage.kind, "name": stage.name, "seconds": round(seconds, 2)}
    return line | measured | dict(state.facts) | ledger
