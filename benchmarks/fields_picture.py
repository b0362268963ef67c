"""Draws what benchmarks/fields.py has measured: one row for each arm, as an SVG file.

    python benchmarks/fields_picture.py LOG --metric auc --title "4 hospitals: AUC" --out heart.svg

A dot is the mean over the seeds, its line two standard deviations to each side.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, TOP, ROW = 560, 150, 60, 44, 26
NAMES = {
    "public": "public part alone",
    "local": "each client alone",
    "pooled": "all rows in one place",
    "federated": "federated",
    "private": "federated, private",
    "small": "... and small, int8",
    "untuned": "private, later rows",
    "personal": "own head, later rows",
}
"""Arm -> its name in the picture."""
TITLE = '<text class="title" x="8" y="20">{title}</text>'
DOT = (
    '<text x="{left}" y="{text}" text-anchor="end">{name}</text>'
    '<line class="rule" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
    '<line class="spread" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
    '<circle cx="{at}" cy="{y}" r="5"/><text x="{beside}" y="{text}">{value}</text>'
)
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #333 } .title { font-weight: 600 }
.rule { stroke: #ddd } .spread { stroke: #1f5fa8; stroke-width: 2 } circle { fill: #1f5fa8 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .rule { stroke: #444 } .spread { stroke: #7db3ee } circle { fill: #7db3ee }
}
</style>"""


def spreads(rows: Iterable[dict[str, Any]], metric: str) -> dict[str, tuple[float, float]]:
    """Returns arm -> mean and standard deviation over the seeds; clients count together.

    >>> rows = [{"arm": "local", "seed": seed, "auc": auc} for seed, auc in ((0, 0.5), (0, 0.7))]
    >>> spreads(rows, "auc")
    {'local': (0.6, 0.0)}
    """
    of_arm: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.get(metric) is not None:
            of_seed = of_arm.setdefault(row["arm"], {})
            of_seed.setdefault(row["seed"], []).append(row[metric])
    found = {}
    for arm, of_seed in of_arm.items():
        means = [statistics.fmean(values) for values in of_seed.values()]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        found[arm] = (round(statistics.fmean(means), 6), round(spread, 6))
    return found


def picture(found: dict[str, tuple[float, float]], title: str, digits: int) -> str:
    """Returns the SVG of one dot for each arm, in the order of `NAMES`."""
    shown = {NAMES[arm]: found[arm] for arm in NAMES if arm in found}
    low = min(mean - 2 * spread for mean, spread in shown.values())
    high = max(mean + 2 * spread for mean, spread in shown.values())
    scale = (WIDTH - LEFT - RIGHT - 24) / ((high - low) or 1.0)
    height = TOP + ROW * len(shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        STYLE,
        TITLE.format(title=escape(title)),
    ]
    for row, (name, (mean, spread)) in enumerate(shown.items()):
        at = LEFT + 12 + (mean - low) * scale
        y = TOP + ROW * row + 6
        places = {
            "left": LEFT - 8,
            "low": LEFT,
            "high": WIDTH - RIGHT,
            "a": round(at - 2 * spread * scale, 1),
            "b": round(at + 2 * spread * scale, 1),
            "at": round(at, 1),
            "y": y,
            "text": y + 4,
            "beside": round(at + 10 + 2 * spread * scale, 1),
        }
        parts.append(DOT.format(name=escape(name), value=f"{mean:.{digits}f}", **places))
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Draws one metric of a log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--title", required=True)
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.log.read_text("utf-8").splitlines()]
    drawn = picture(spreads(rows, given.metric), given.title, given.digits)
    given.out.write_text(drawn, "utf-8")


if __name__ == "__main__":
    main()
