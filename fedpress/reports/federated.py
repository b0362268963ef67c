"""Draws the figures of a federated stage: metric, epsilon and bytes per round; client metrics.

The argument `name` is the name of the stage, and `rounds` are the records of its rounds. A function
returns None if the records lack the numbers of its figure.
"""

from __future__ import annotations

import math
from itertools import accumulate

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import (
    BLUE,
    MOST_CIRCLES,
    ORANGE,
    Axis,
    Figure,
    Panel,
    Series,
    bars,
    dots,
    line,
    rows_height,
    score_axis,
    short,
    total_of,
    values,
)
from fedpress.reports.reading import Json, name_of

MOST_CLIENT_ROWS = 40  # more names in one picture cannot be read: a histogram is drawn instead


def score_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Draws the main metric over the rounds, and below it the epsilon spent so far."""
    if not rounds:
        return None
    shown = MetricFormat.of(rounds)
    x, spent = values(rounds, "round"), values(rounds, "epsilon")
    score = values(rounds, shown.key, shown.scale)
    caption = f"Validation {shown.name} {shown.from_to(score)} over {len(rounds)} rounds"
    curve = line(shown.name, x, score, unit=shown.unit, across="round")
    top = Panel(score_axis(shown, "validation"), [curve])

    known = [epsilon for epsilon in spent if epsilon is not None]
    if not known:
        title = f"{shown.title} over rounds: {name}"
        without = f"{caption}, without differential privacy."
        return Figure(title, without, Axis("round"), [top], together=True)

    epsilons = line("ε spent", x, spent, color=ORANGE, across="round")
    end = units.epsilon(known[-1])
    return Figure(
        f"{shown.title} and privacy spent: {name}",
        f"{caption}; below it the privacy spent so far, ε = {end} at the end.",
        Axis("round"),
        [top, Panel(Axis("ε spent", low=0.0), [epsilons])],
        height=380,
        together=True,
    )


def bytes_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Draws the bytes up and down of each round, and below them their running sums."""
    up, down = values(rounds, "bytes_up"), values(rounds, "bytes_down")
    if not any(up) and not any(down):
        return None
    # One round and the sum of all may differ by orders of magnitude: each panel has its own unit.
    prefix, size = units.scale(max(b or 0.0 for b in up + down))
    total_prefix, total_size = units.scale(total_of(up + down))
    x = values(rounds, "round")
    each, so_far = [], []
    for word, amounts, color in (("up", up, BLUE), ("down", down, ORANGE)):
        scaled = [b and b / size for b in amounts]
        each.append(bars(word, x, scaled, color=color, unit=f" {prefix}B", across="round"))
        # A round without a record of its bytes adds nothing to the sum.
        sums = accumulate(b or 0.0 for b in amounts)
        totals = [total / total_size for total in sums]
        hover = [f"{word}, so far {short(total)} {total_prefix}B" for total in totals]
        so_far.append(Series("areas", f"{word}, so far", x, totals, color, hover, in_legend=False))
    caption = (
        f"{units.size(total_of(up))} up to the server and {units.size(total_of(down))} "
        f"down to the clients in {len(rounds)} rounds; each round above, the sum so far below."
    )
    return Figure(
        f"Bytes sent: {name}",
        caption + _before_first_round(rounds),
        Axis("round"),
        [
            Panel(Axis(f"per round ({prefix}B)", low=0.0), each, stacked=True),
            Panel(Axis(f"so far ({total_prefix}B)", low=0.0), so_far, stacked=True),
        ],
        height=380,
        together=True,
        legend=True,
    )


def _before_first_round(rounds: list[Json]) -> str:
    """Returns a sentence on the bytes sent before the first round; "" if none are recorded."""
    up = total_of(values(rounds, "set_up_bytes_up"))
    down = total_of(values(rounds, "set_up_bytes_down"))
    if not up and not down:
        return ""
    sent = f"{units.size(up)} up and {units.size(down)} down"
    return f" Before the first round, to set up: {sent}."


def score_over_bytes(name: str, rounds: list[Json]) -> Figure | None:
    """Draws the metric over all bytes sent so far, up and down together.

    This compares methods by their traffic. A figure over rounds does not, because methods send
    different amounts per round.
    """
    shown = MetricFormat.of(rounds)
    score = values(rounds, shown.key, shown.scale)
    sent = []
    for up, down in zip(values(rounds, "bytes_up"), values(rounds, "bytes_down"), strict=True):
        sent.append((up or 0.0) + (down or 0.0))
    # Without bytes the x-axis, and without a metric the y-axis, would be empty.
    if not any(sent) or all(a is None for a in score):
        return None

    prefix, size = units.scale(total_of(sent))
    # The x-axis needs running sums: how much was sent until this metric was reached.
    so_far = [total / size for total in accumulate(sent)]
    hover = []
    for value, total in zip(score, so_far, strict=True):
        text = ""
        if value is not None:
            text = f"{shown.format_scaled(value)} after {short(total)} {prefix}B"
        hover.append(text)
    marked = len(rounds) < MOST_CIRCLES
    curve = Series("line", shown.name, so_far, score, hover=hover, marked=marked)
    total_sent = units.size(total_of(sent))
    return Figure(
        f"{shown.title} over bytes: {name}",
        f"Validation {shown.name} {shown.from_to(score)} for {total_sent} up and down together.",
        Axis(f"bytes sent, up and down ({prefix}B)", low=0.0),
        [Panel(score_axis(shown, "validation"), [curve])],
    )


def client_scores(stage: Json) -> Figure | None:
    """Draws the final model's metric on each client: dots, or a histogram for over 40 clients."""
    shown = MetricFormat.of([stage])
    names, scores = _measured_clients(stage, shown)
    # Under privacy no client is measured.
    if not names:
        return None
    # Sorted for the median and the histogram; the dots keep the order of the clients.
    ordered = sorted(scores)
    title = f"{shown.title} per client: {name_of(stage)}"
    median = ordered[len(ordered) // 2]
    lowest, highest = shown.format_scaled(ordered[0]), shown.format_scaled(ordered[-1])
    caption = (
        f"{len(names)} clients, from {lowest} to {highest}, median {shown.format_scaled(median)}."
    )
    if len(names) > MOST_CLIENT_ROWS:
        histogram = Panel(Axis("clients", low=0.0), [_histogram(ordered, shown)])
        return Figure(title, caption, Axis(shown.axis()), [histogram])

    hover, labels = [], []
    for name, score in zip(names, scores, strict=True):
        hover.append(f"{name}: {shown.format_scaled(score)}")
        labels.append(f"{score:.1f}%" if shown.metric.share else short(score))
    # Dots, because the axis of a metric does not begin at 0.
    panel = Panel(Axis("", names=names), [dots(shown.name, scores, hover=hover, labels=labels)])
    return Figure(title, caption, score_axis(shown), [panel], height=rows_height(len(names)))


def _measured_clients(stage: Json, shown: MetricFormat) -> tuple[list[str], list[float]]:
    """Returns the names of the clients whose metric is a number, and the metrics to draw."""
    measured = stage.get(f"client_{shown.key}")
    names, scores = [], []
    for name, value in measured.items() if isinstance(measured, dict) else ():
        score = units.number(value)
        if score is not None:
            names.append(name)
            scores.append(shown.scale * score)
    return names, scores


def _histogram(ordered: list[float], shown: MetricFormat) -> Series:
    """Returns a histogram of sorted numbers, with a bar in the middle of each bin."""
    low, high = ordered[0], ordered[-1]
    # If all numbers are equal, bins of width 0 would make the division below fail.
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    # The square root of the number of values is the usual choice; fewer than 8 bars show no shape.
    count = min(30, max(8, round(math.sqrt(len(ordered)))))
    width = (high - low) / count
    counts = [0] * count
    for number in ordered:
        place = int((number - low) / width)
        counts[min(count - 1, place)] += 1  # the largest number belongs to the last bin
    middles, hover = [], []
    for at, clients in enumerate(counts):
        begin = low + at * width
        middles.append(begin + width / 2)
        end = begin + width
        limits = f"from {shown.format_scaled(begin)} to {shown.format_scaled(end)}"
        hover.append(f"{clients} clients {limits}")
    return Series("bars", "clients", middles, [float(n) for n in counts], hover=hover)
