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
- small: the whole recipe.

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


def results(
    recipe: Mapping[str, Any], data: FederatedData, out: Path, code: str | tuple[()]
) -> list[dict[str, Any]]:
    """Returns the results of all stages of a recipe; `code` is the model's function, if any."""
    run = fedpress.run(recipe, data=data, out=out, allow_code=code, progress=False)
    return [dict(line) for line in run.result["stages"]]


def measured(
    recipe: Mapping[str, Any],
    seed: int,
    wanted: list[str],
    alone: int | None,
    plain: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Yields a row for each arm: its name, and what the network is worth on the test rows."""
    recipe = {**recipe, "seed": seed}
    data = load(DataSettings(**recipe["data"]), seed)
    stages, architecture = recipe["stage"], recipe["model"]["architecture"]
    code = architecture if ":" in architecture else ()
    at = next(i for i, stage in enumerate(stages) if stage["kind"] == "federate")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if at:
            row, begun = {"arm": "public", "seed": seed}, time.perf_counter()
            lines = results({**recipe, "stage": stages[:at]}, data, folder / "public", code)
            yield {**row, "seconds": round(time.perf_counter() - begun, 1), **lines[-1]}
            recipe = {**recipe, "model": {"checkpoint": str(folder / "public")}}
        for number, (arm, own, given) in enumerate(arms(stages[at:], data, alone, plain)):
            if arm not in wanted:
                continue
            begun = time.perf_counter()
            lines = results({**recipe, "stage": own}, given, folder / str(number), code)
            took = round(time.perf_counter() - begun, 1)
            named = {arm: lines[-1]}
            if arm == "private":
                named = {"private": lines[0], "small": lines[-1]}
            for name, line in named.items():
                yield {"arm": name, "seed": seed, "seconds": took, **line}


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
    parser.add_argument("--log", type=Path, help="append each result to this file")
    given = parser.parse_args()
    sys.path.insert(0, str(given.recipe.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(given.recipe.parent), os.environ.get("PYTHONPATH", "")]
    )
    recipe = tomllib.loads(given.recipe.read_text("utf-8"))
    recipe["data"]["path"] = str(given.data)
    plain = tomllib.loads("\n".join(given.plain))
    rows = []
    for seed in given.seeds:
        for row in measured(recipe, seed, given.arms, given.alone, plain):
            rows.append(row)
            print(
                {key: row.get(key) for key in ("arm", "seed", "seconds", *given.metrics)},
                flush=True,
            )
            if given.log is not None:
                with open(given.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, default=str) + "\n")
    print(table(rows, given.metrics))


if __name__ == "__main__":
    main()
