"""fedpress: a recipe of one federate stage, run by `fedpress.Run`, in the engine of the task."""

from __future__ import annotations

import tempfile

import torch
from shared import MEAN, STD, Clock, Task, load

import fedpress
from fedpress.core.examples import Arrays, Preprocess


def federated(task: Task) -> fedpress.FederatedData:
    """Returns the data set; the held-out images are its validation set and its test set."""
    data = load(task.folder)
    clients = {}
    for number, rows in enumerate(data.clients):
        clients[f"c{number}"] = Arrays(data.x[rows], data.y[rows])
    held = Arrays(data.held_x, data.held_y)
    names = tuple(str(number) for number in range(10))
    return fedpress.FederatedData(
        "simulation",
        clients,
        public=held.take(torch.arange(0)),
        validation=held,
        test=held,
        num_classes=len(names),
        class_names=names,
        preprocess=Preprocess(MEAN, STD),
    )


def recipe(task: Task) -> dict[str, object]:
    """Returns the recipe of the run."""
    stage = {
        "kind": "federate",
        "num_rounds": task.rounds,
        "cohort": task.cohort,
        "batch_size": task.batch,
        "lr": task.lr,
        "weights": "equal",
        "precision": task.precision,
        **task.extra,
    }
    return {
        "name": "simulation",
        "seed": task.seed,
        # Replaced by the data set in memory.
        "data": {"source": "cifar10"},
        "model": {"architecture": "shared:cnn"},
        "stage": [stage],
    }


def main() -> None:
    """Runs the recipe."""
    task = Task.read()
    clock = Clock(task)
    torch.set_num_threads(task.threads)
    data = federated(task)
    with tempfile.TemporaryDirectory() as folder:
        run = fedpress.Run.begin(
            recipe(task),
            data=data,
            out=f"{folder}/run",
            engine=task.engine,
            allow_code="shared:cnn",
        )
        begun = -1
        for event in run.events():
            # The first tick with a new number of rounds comes when that many rounds are done.
            is_round = isinstance(event, fedpress.Tick) and event.total == task.rounds
            if is_round and event.done > begun:
                begun = event.done
                clock.lap()
        share = run.records[-1]["accuracy"]
    clock.write(share, ["fedpress"])


if __name__ == "__main__":
    main()
