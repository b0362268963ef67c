"""What a federation is worth in a field: local, pooled, federated, private, compressed.

    python benchmarks/fields.py examples/medicine/heart.toml --data DIR --seeds 0 1 2

The recipe is an example's: perhaps stages on public data, then a federate stage with privacy, then
stages that make the model smaller. For each seed, which also splits the rows anew, all arms start
with the same weights and are measured on the same test rows:

- public: the stages before the federate stage; all further arms start with its result;
- local: each client trains alone, for as many epochs as in the federation; the mean over clients
  (`--alone N`: over N of them);
- pooled: all rows of the clients in one place, which nobody may do;
- federated: the recipe's federate stage without privacy; where its noised step is one for all
  clients in a round, `--plain num_rounds=40 lr=0.002` sets what this arm, local and pooled have
  instead;
- private: the federate stage as it is;
- small: the whole recipe;
- personal (`--head NAMES`, recipes with `test_clients`): each test client takes the private model
  and tunes the parameters NAMES on the first half of its own rows; measured on the second half.
  `untuned` is the private model on the same rows.

With `--leave-others-out` each seed has other test clients: the next ones in the list of names.
The table has the mean and the standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fedpress
from fedpress.core.examples import Arrays
from fedpress.data.dataset import FederatedData
from fedpress.data.load import load
from fedpress.data.settings import DataSettings

Stages = list[dict[str, Any]]
LOCAL = ("batch_size", "lr", "optimizer", "momentum", "betas", "weight_decay")
"""Keys of a federate stage that a client's own training has too."""


def arms(
    stages: Stages, data: FederatedData, alone: int | None, plain: Mapping[str, Any]
) -> Iterator[tuple[str, Stages, FederatedData]]:
    """Yields name, stages and data of each run; "local" comes once for each client.

    Args:
        stages: the federate stage and those after it.
        data: the clients and the public part.
        alone: number of clients that train alone, spread evenly over their list; None for all.
        plain: keys of the federate stage in the arms without privacy, instead of the recipe's.
    """
    federate = {**stages[0], **plain}
    # A client that is in half of the cohorts trains in half of the rounds.
    share = federate.get("cohort", len(data.clients)) / len(data.clients)
    rounds = max(1, round(federate["num_rounds"] * share))
    train = {
        "kind": "train",
        "epochs": rounds * federate.get("epochs", 1),
        **{key: federate[key] for key in LOCAL if key in federate},
    }
    open_ = {key: value for key, value in federate.items() if key != "privacy"}
    clients = list(data.clients.values())
    step = 1 if alone is None else max(1, len(clients) // alone)
    for arrays in clients[::step][:alone]:
        yield "local", [train], replace(data, public=arrays)
    pooled = Arrays(
        torch.cat([each.x for each in clients]), torch.cat([each.y for each in clients])
    )
    yield "pooled", [train], replace(data, public=pooled)
    yield "federated", [open_], data
    yield "private", stages, data


def left_others_out(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns `[data]` in which each test client is replaced by the client `seed` names later."""
    data = load(DataSettings(**settings), 0)
    names = sorted({*data.clients, *settings["test_clients"]})
    left = [names[(names.index(name) + seed) % len(names)] for name in settings["test_clients"]]
    return {**settings, "test_clients": left}


def at_home(settings: Mapping[str, Any], data: FederatedData, seed: int) -> Iterator[FederatedData]:
    """Yields the data of each test client alone: it holds its first rows, its last are the test."""
    halves = load(DataSettings(**{**settings, "test_clients": (), "test_share": 0.5}), seed)
    assert halves.test_owners is not None, "clients with names are natural"
    for name in settings["test_clients"]:
        own = halves.test_owners == halves.test_owner_names.index(name)
        last = Arrays(halves.test.x[own], halves.test.y[own])
        # Means and deviations stay those of the federation.
        yield replace(
            data,
            clients={name: halves.clients[name]},
            test=last,
            test_owners=None,
            test_owner_names=(),
        )


def personal(stage: Mapping[str, Any], head: str) -> dict[str, Any]:
    """Returns the stage in which a client tunes the parameters `head`, for itself."""
    kept = {key: stage[key] for key in LOCAL if key in stage}
    return {"kind": "federate", "num_rounds": 20, "epochs": 1, **kept, "trainable": [head]}


def results(
    recipe: Mapping[str, Any], data: FederatedData, out: Path, code: str | tuple[()]
) -> list[dict[str, Any]]:
    """Returns the results of all stages of a recipe; `code` is the model's function, if any."""
    run = fedpress.run(recipe, data=data, out=out, allow_code=code, progress=False)
    return [dict(line) for line in run.result["stages"]]


def measured(
    recipe: Mapping[str, Any], seed: int, ask: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yields a row for each arm: its name, and what the network is worth on the test rows.

    Args:
        recipe: the recipe.
        seed: of split, weights, batches and noise.
        ask: the arguments of the command.
        folder: where the runs are kept: one for each arm, "local" one for each client.
    """
    recipe = dict(recipe, seed=seed)
    if ask.leave_others_out:
        recipe["data"] = left_others_out(recipe["data"], seed)
    data = load(DataSettings(**recipe["data"]), seed)
    stages, architecture = recipe["stage"], recipe["model"]["architecture"]
    code = architecture if ":" in architecture else ()
    at = next(i for i, stage in enumerate(stages) if stage["kind"] == "federate")

    def timed(arm: str, own: Stages, given: FederatedData, name: str) -> list[dict[str, Any]]:
        begun = time.perf_counter()
        lines = results({**recipe, "stage": own}, given, folder / name, code)
        row = {"arm": arm, "seed": seed, "seconds": round(time.perf_counter() - begun, 1)}
        return [{**line, **row} for line in lines]

    if at:
        yield timed("public", stages[:at], data, "public")[-1]
        recipe["model"] = {"checkpoint": str(folder / "public")}
    plain = tomllib.loads("\n".join(ask.plain))
    for number, (arm, own, given) in enumerate(arms(stages[at:], data, ask.alone, plain)):
        if arm not in ask.arms:
            continue
        lines = timed(arm, own, given, f"{arm}-{number}" if arm == "local" else arm)
        yield lines[0]
        if arm == "private":
            yield {**lines[-1], "arm": "small"}
    if ask.head is None:
        return
    recipe["model"] = {"checkpoint": str(folder / "private" / "stages" / "0-federate")}
    tuned = personal({**stages[at], **plain}, ask.head)
    for number, given in enumerate(at_home(recipe["data"], data, seed)):
        yield timed("untuned", [{**tuned, "num_rounds": 0}], given, f"untuned-{number}")[-1]
        yield timed("personal", [tuned], given, f"personal-{number}")[-1]


def table(rows: list[dict[str, Any]], metrics: list[str]) -> str:
    """Returns mean and standard deviation over the seeds, of each arm and metric."""
    lines = ["| arm | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = []
        for metric in metrics:
            of_seed: dict[int, list[float]] = {}
            for row in rows:
                if row["arm"] == arm and row.get(metric) is not None:
                    of_seed.setdefault(row["seed"], []).append(row[metric])
            means = [statistics.fmean(values) for values in of_seed.values()]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.3f}{spread}" if means else "–")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures all arms of a recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--metrics", nargs="+", default=["accuracy", "balanced_accuracy", "auc"])
    parser.add_argument("--arms", nargs="+", default=["local", "pooled", "federated", "private"])
    parser.add_argument("--alone", type=int, help="clients that train alone; all by default")
    parser.add_argument(
        "--plain", nargs="+", default=[], help="KEY=VALUE of the plain arms, as TOML"
    )
    parser.add_argument("--head", help="parameters that each test client tunes, such as 14.*")
    parser.add_argument("--leave-others-out", action="store_true", help="with each seed")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs; by default they are deleted"
    )
    parser.add_argument("--log", type=Path, help="append each result to this file")
    given = parser.parse_args()
    if given.head is not None and "private" not in given.arms:
        parser.error("--head tunes the private model: add private to --arms")
    sys.path.insert(0, str(given.recipe.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(given.recipe.parent), os.environ.get("PYTHONPATH", "")]
    )
    recipe = tomllib.loads(given.recipe.read_text("utf-8"))
    recipe["data"]["path"] = str(given.data)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name) if given.keep is None else given.keep
        for seed in given.seeds:
            for row in measured(recipe, seed, given, kept / str(seed)):
                rows.append(row)
                shown = ("arm", "seed", "seconds", *given.metrics)
                print({key: row.get(key) for key in shown}, flush=True)
                if given.log is not None:
                    with open(given.log, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row, default=str) + "\n")
    print(table(rows, given.metrics))


if __name__ == "__main__":
    main()
