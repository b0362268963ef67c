"""What a federation is worth where only the clients know two kinds of customers, by epsilon and trust.

    python benchmarks/new_branches.py --data DIR --seeds 0 1 2

The recipe is `examples/finance/new-branches.toml`: four branches of banks publish rows, none of the
young customers of schools and universities. Test rows are those of a branch of each kind; `new` is
the AUC on the two kinds that the public rows lack. Learning rates were set beforehand, not tuned.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from new_classes import JOINT, table

import fedpress
from fedpress.core.examples import Arrays
from fedpress.data.load import load
from fedpress.data.settings import DataSettings

RECIPE = Path(__file__).parents[1] / "examples" / "finance" / "new-branches.toml"
NEW = ("school young 10", "university young 10")
ARMS: dict[str, dict[str, Any]] = {
    "none": {"num_rounds": 20, "batch_size": 64, "lr": 0.05},
    "local": {"num_rounds": 10, "batch_size": 128, "lr": 0.2},
    "secure": {"num_rounds": 60, "batch_size": 128, "lr": 1.0, "aggregator": "secure", **JOINT},
    "central": {"num_rounds": 60, "batch_size": 128, "lr": 1.0},
}


def new_rows(recipe: dict[str, Any]) -> Arrays:
    """Returns the test rows of the kinds that the public rows lack."""
    settings = DataSettings(**{**recipe["data"], "test_clients": NEW})
    return load(settings, 0).test


def auc(stage: Path, rows: Arrays) -> float:
    """Returns the area under the curve of a stage's network on some rows, in percent."""
    return 100 * float(fedpress.evaluate(stage, data=(rows.x, rows.y))["auc"])


def of_seed(recipe: dict[str, Any], seed: int, epsilons: list[float]) -> Iterator[dict[str, Any]]:
    """Yields one row for each arm of one seed."""
    data = load(DataSettings(**recipe["data"]), seed)
    new = new_rows(recipe)
    train, federate, quantize = recipe["stage"][:3]
    for arm, how in ARMS.items():
        for epsilon in [None] if arm == "none" else epsilons:
            stage = {**federate, **how}
            del stage["privacy"]
            if epsilon is not None:
                stage["privacy"] = {**federate["privacy"], "trust": arm, "epsilon": epsilon}
            whole = {**recipe, "seed": seed, "stage": [train, stage, quantize]}
            with tempfile.TemporaryDirectory() as folder:
                run = fedpress.run(whole, data=data, out=f"{folder}/run", progress=False)
                places = sorted(Path(f"{folder}/run/stages").iterdir())
                before, after = (auc(place, new) for place in places[:2])
                lines = run.result["stages"]
            same = {"arm": arm, "epsilon": epsilon, "seed": seed}
            if arm == "none":
                yield {**same, "arm": "before", "auc": 100 * lines[0]["auc"], "new": before}
            more = {"up": lines[1]["bytes_up"], "down": lines[1]["bytes_down"]}
            after_it = {"auc": 100 * lines[1]["auc"], "new": after, "int8": 100 * lines[2]["auc"]}
            yield {**same, **after_it, **more}


def main() -> None:
    """Prints a row for each arm, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of the CSV file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0, 0.5])
    given = parser.parse_args()
    sys.path.insert(0, str(RECIPE.parent))
    recipe = tomllib.loads(RECIPE.read_text("utf-8"))
    recipe["data"]["path"] = str(given.data)
    found = []
    for seed in given.seeds:
        for row in of_seed(recipe, seed, given.epsilon):
            print(json.dumps(row), flush=True)
            found.append(row)
    print(table(found, ("auc", "new", "int8", "up", "down")))


if __name__ == "__main__":
    main()
