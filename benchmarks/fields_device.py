"""What a field's small network is worth on a device: accuracy read back from a file, and latency.

    python benchmarks/fields_device.py examples/sensors/activity.toml --data DIR --runs RUNS

RUNS is the folder that `benchmarks/fields.py ... --keep RUNS` has filled with the same recipe. For
each seed in it, the quantized network is written in each format with `int8`, the file answers the
same test rows, and one row at a time is measured on one thread. Formats of different environments
(docs/devices.md) go into one `--log`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from pathlib import Path

import fields
import torch

from fedpress.data.load import load
from fedpress.data.settings import DataSettings

SHOWN = ("format", "seed", "file_bytes", "latency_ms", "left_float")


def main() -> None:
    """Exports and measures all seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["onnx"])
    parser.add_argument("--leave-others-out", action="store_true", help="as the runs did")
    parser.add_argument("--metrics", nargs="+", default=["accuracy", "balanced_accuracy"])
    parser.add_argument("--log", type=Path, help="append each result to this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(given.recipe.parent))
    recipe = tomllib.loads(given.recipe.read_text("utf-8"))
    recipe["data"]["path"] = str(given.data)
    architecture = recipe["model"]["architecture"]
    code = architecture if ":" in architecture else ()
    for folder in sorted(given.runs.iterdir()):
        seed = int(folder.name)
        settings = recipe["data"]
        if given.leave_others_out:
            settings = fields.left_others_out(settings, seed)
        data = load(DataSettings(**settings), seed)
        (model,) = (folder / "private" / "stages").glob("*-quantize")
        own = {**recipe, "seed": seed, "model": {"checkpoint": str(model)}}
        for name in given.formats:
            own["stage"] = [{"kind": "export", "format": name, "int8": True}]
            with tempfile.TemporaryDirectory() as out:
                line = fields.results(own, data, Path(out) / "run", code)[-1]
            row = {**line, "seed": seed, "format": name}
            print({key: row.get(key) for key in (*SHOWN, *given.metrics)}, flush=True)
            if given.log is not None:
                with open(given.log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, default=str) + "\n")


if __name__ == "__main__":
    main()
