"""A table larger than memory: 20 GB of parquet train in 2 GB, under the operating system's limit.

    python benchmarks/larger_than_memory.py --folder DIR --gigabytes 20 --limit 2

Writes a made table (512 numbers a row, 100 clients and an open one), then federates a small network
in a process of its own, which a control group kills if it takes more than the limit. The page cache
counts against the limit, so nothing of the file stays in memory beside it. Needs the right to make
a control group, and twice the size of the table on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

WIDTH = 512
CLIENTS = 100
RECIPE = """
name = "large"
[data]
source = "parquet"
path = "{path}"
client_column = "client"
public_clients = ["open"]
test_share = 0.001
stream = true
[model]
architecture = "mlp"
arguments = {{ hidden = [64] }}
[[stage]]
kind = "federate"
num_rounds = 3
cohort = 5
batch_size = 256
lr = 0.1
"""


def write(path: Path, gigabytes: float) -> int:
    """Writes a table whose label follows from its numbers; returns its number of rows."""
    chance = np.random.default_rng(0)
    rows = int(gigabytes * 1e9 / (4 * WIDTH * (CLIENTS + 0.2)))
    weights = chance.normal(size=WIDTH).astype(np.float32)
    names = [f"x{at}" for at in range(WIDTH)]
    writer = None
    for client in range(CLIENTS + 1):
        count = rows if client else rows // 5
        x = chance.standard_normal((count, WIDTH), np.float32)
        table = pa.table(
            {name: x[:, at] for at, name in enumerate(names)}
            | {"client": [f"c{client}" if client else "open"] * count, "label": x @ weights > 0}
        )
        if writer is None:
            plain = {"compression": "none", "use_dictionary": ["client"]}
            writer = pyarrow.parquet.ParquetWriter(path, table.schema, **plain)
        writer.write_table(table, row_group_size=1 << 15)
    assert writer is not None, "there is a client"
    writer.close()
    # What this process has written stays in the page cache, uncounted, unless it is dropped.
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return CLIENTS * rows + rows // 5


def limited(gigabytes: float) -> tuple[Callable[[], None], Callable[[], int]]:
    """Returns a function that puts a process under a limit, and one that reads the peak in bytes."""
    name, size = f"fedpress-{os.getpid()}", str(int(gigabytes * 1e9))
    old = Path("/sys/fs/cgroup/memory")
    new = Path("/sys/fs/cgroup")
    group, key, peak = (
        (old / name, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
        if old.exists()
        else (new / name, "memory.max", "memory.peak")
    )
    group.mkdir()
    (group / key).write_text(size)

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return enter, lambda: int((group / peak).read_text())


def main() -> None:
    """Prints what was written, what the run took, and what it learned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--limit", type=float, default=2, help="gigabytes of memory")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "large.parquet"
    begun = time.perf_counter()
    rows = write(path, given.gigabytes)
    print(
        f"{rows:,} rows of {WIDTH} numbers, {path.stat().st_size / 1e9:.1f} GB, "
        f"made in {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    recipe = given.folder / "large.toml"
    recipe.write_text(RECIPE.format(path=path))
    enter, peak = limited(given.limit)
    out = given.folder / "run"
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "fedpress", "run", str(recipe), "--out", str(out)],
        check=True,
        preexec_fn=enter,
        env={**os.environ, "FEDPRESS_CACHE": str(given.folder / "cache")},
    )
    result = json.loads((out / "result.json").read_text("utf-8"))["stages"][-1]
    print(
        f"{time.perf_counter() - begun:.0f} s, of which the federation took "
        f"{result['seconds']:.0f} s, peak {peak() / 1e9:.2f} GB with the page cache, "
        f"accuracy {result['accuracy_before']:.3f} -> {result['accuracy']:.3f}"
    )


if __name__ == "__main__":
    main()
