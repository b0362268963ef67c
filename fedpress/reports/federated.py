"""The figures of a federated stage: accuracy and privacy over the rounds, bytes, and how each client fares."""

from __future__ import annotations

import math
from itertools import accumulate

from fedpress.reports import units
from fedpress.reports.metrics import Shown
from fedpress.reports.plot import (
    BLUE,
    ORANGE,
    Axis,
    Figure,
    Panel,
    Series,
    bars,
    line,
    lying_bars,
    short,
    total_of,
    values,
)
from fedpress.reports.reading import Json

MANY_CLIENTS = 40  # above this, bars with names cannot be read: show the distribution


def score_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Shows the primary metric over the rounds with the epsilon that was spent for it."""
    if not rounds:
        return None
    shown = Shown.of(rounds)
    x, spent = values(rounds, "round"), values(rounds, "epsilon")
    score = values(rounds, shown.key, shown.scale)
    caption = f"Validation {shown.name} {shown.from_to(score)} over {len(rounds)} rounds"
    curve = line(shown.name, x, score, unit=shown.unit, across="round")
    top = Panel(Axis(shown.axis("validation")), [curve])
    if all(e is None for e in spent):
        said = f"{caption}, without differential privacy."
        return Figure(
            f"{shown.title} over rounds: {name}", said, Axis("round"), [top], together=True
        )
    last = next(e for e in reversed(spent) if e is not None)
    return Figure(
        f"{shown.title} and privacy spent: {name}",
        f"{caption}; below it the privacy spent so far, ε = {units.epsilon(last)} at the end.",
        Axis("round"),
        [
            top,
            Panel(
                Axis("ε spent", low=0.0), [line("ε spent", x, spent, color=ORANGE, across="round")]
            ),
        ],
        height=380,
        together=True,
    )


def bytes_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Shows bytes up and down per round, and their sum so far."""
    up, down = values(rounds, "bytes_up"), values(rounds, "bytes_down")
    if not any(up) and not any(down):
        return None
    prefix, size = units.scale(max(b or 0.0 for b in up + down))
    total_prefix, total_size = units.scale(total_of(up + down))
    x = values(rounds, "round")
    each, so_far = [], []
    for word, amounts, color in (("up", up, BLUE), ("down", down, ORANGE)):
        scaled = [b and b / size for b in amounts]
        each.append(bars(word, x, scaled, color=color, unit=f" {prefix}B", across="round"))
        totals = [total / total_size for total in accumulate(b or 0.0 for b in amounts)]
        hover = [f"{word}, so far {short(total)} {total_prefix}B" for total in totals]
        so_far.append(Series("areas", f"{word}, so far", x, totals, color, hover, in_legend=False))
    caption = (
        f"{units.count(total_of(up), 'B')} up to the server and {units.count(total_of(down), 'B')} down to the clients"
        f" in {len(rounds)} rounds; each round above, the sum so far below."
    )
    return Figure(
        f"Bytes sent: {name}",
        caption + _before(rounds),
        Axis("round"),
        [
            Panel(Axis(f"per round ({prefix}B)", low=0.0), each, stacked=True),
            Panel(Axis(f"so far ({total_prefix}B)", low=0.0), so_far, stacked=True),
        ],
        height=380,
        together=True,
        legend=True,
    )


def _before(rounds: list[Json]) -> str:
    """Says how many bytes were sent before the first round; nothing for a run of an older version."""
    up, down = (total_of(values(rounds, f"set_up_bytes_{way}")) for way in ("up", "down"))
    if not up and not down:
        return ""
    return f" Before the first round, to set up: {units.count(up, 'B')} up and {units.count(down, 'B')} down."


def score_over_bytes(name: str, rounds: list[Json]) -> Figure | None:
    """Shows the metric over all bytes sent so far, up and down: what a connection costs is bytes, not rounds."""
    shown = Shown.of(rounds)
    score = values(rounds, shown.key, shown.scale)
    sent = [
        (up or 0.0) + (down or 0.0)
        for up, down in zip(values(rounds, "bytes_up"), values(rounds, "bytes_down"), strict=True)
    ]
    if not any(sent) or all(a is None for a in score):
        return None
    prefix, size = units.scale(total_of(sent))
    so_far = [total / size for total in accumulate(sent)]
    hover = [
        "" if a is None else f"{shown.drawn(a)} after {short(b)} {prefix}B"
        for a, b in zip(score, so_far, strict=True)
    ]
    return Figure(
        f"{shown.title} over bytes: {name}",
        f"Validation {shown.name} {shown.from_to(score)} for {units.count(total_of(sent), 'B')} up and down together.",
        Axis(f"bytes sent, up and down ({prefix}B)", low=0.0),
        [
            Panel(
                Axis(shown.axis("validation")),
                [Series("line", shown.name, so_far, score, hover=hover, marked=len(rounds) < 60)],
            )
        ],
    )


def client_scores(stage: Json) -> Figure | None:
    """Shows how well the final model of a stage does for each client: bars, or a histogram of many."""
    shown = Shown.of([stage])
    measured = stage.get(f"client_{shown.key}")
    measured = measured.items() if isinstance(measured, dict) else ()
    pairs = [
        (name, shown.scale * x)
        for name, x in ((n, units.number(a)) for n, a in measured)
        if x is not None
    ]
    if not pairs:
        return None
    numbers = sorted(x for _, x in pairs)
    title = f"{shown.title} per client: {stage.get('name') or stage.get('kind')}"
    median = numbers[len(numbers) // 2]
    caption = (
        f"{len(pairs)} clients, from {shown.drawn(numbers[0])} to {shown.drawn(numbers[-1])}, "
        f"median {shown.drawn(median)}."
    )
    if len(pairs) > MANY_CLIENTS:
        return Figure(
            title,
            caption,
            Axis(shown.axis()),
            [Panel(Axis("clients", low=0.0), [_histogram(numbers, shown)])],
        )
    bar = lying_bars(
        shown.name,
        [x for _, x in pairs],
        hover=[f"{n}: {shown.drawn(x)}" for n, x in pairs],
        beside=[f"{x:.1f}{shown.unit}" for _, x in pairs],
    )
    panel = Panel(Axis("", names=[n for n, _ in pairs]), [bar])
    return Figure(
        title,
        caption,
        Axis(shown.axis(), low=0.0, high=100.0 if shown.metric.share else None),
        [panel],
        height=110 + 24 * len(pairs),
    )


def _histogram(numbers: list[float], shown: Shown) -> Series:
    """Returns how many of the sorted `numbers` lie in each of some equal bins; a bar stands in a bin's middle."""
    low, high = numbers[0], numbers[-1]
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    count = min(30, max(8, round(math.sqrt(len(numbers)))))
    width = (high - low) / count
    counts = [0] * count
    for number in numbers:
        counts[min(count - 1, int((number - low) / width))] += 1
    middles = [low + (i + 0.5) * width for i in range(count)]
    hover = [
        f"{n} clients from {shown.drawn(m - width / 2)} to {shown.drawn(m + width / 2)}"
        for n, m in zip(counts, middles, strict=True)
    ]
    return Series("bars", "clients", middles, [float(n) for n in counts], hover=hover)
