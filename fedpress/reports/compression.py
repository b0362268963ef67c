"""Draws the figures of compression: sensitivity, density, bits of each layer, bytes of a file.

The argument `name` is the name of the stage, for the title. A function returns None if the run has
no data for its figure.
"""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import (
    BLUE,
    FAINT,
    ORANGE,
    Axis,
    Color,
    Figure,
    Panel,
    Series,
    horizontal_bars,
    line,
    rows_height,
    score_axis,
    short,
    values,
)
from fedpress.reports.reading import Json, name_of

NAMED_LAYERS = 8  # largest number of coloured lines; further lines are grey


def sensitivity_curves(name: str, records: list[Json]) -> Figure | None:
    """Draws the metric against the density of a layer, one line for each layer.

    Each point was measured with one layer pruned and all other layers whole. The 8 most sensitive
    layers are coloured.
    """
    points = []
    for record in records:
        if isinstance(record.get("sensitivity"), dict):
            points.append(record["sensitivity"])
    shown_by = MetricFormat.of(points)
    curves = _curves(points, shown_by)
    if not curves:
        return None

    higher = shown_by.metric.better == "higher"
    worst: dict[str, float] = {}
    for layer, curve in curves.items():
        scores = [float(point[shown_by.key]) for point in curve]
        # The worse the metric is at the layer's worst point, the more sensitive is the layer.
        worst[layer] = min(scores) if higher else max(scores)
    order = sorted(curves, key=lambda layer: worst[layer], reverse=not higher)
    # One layer stands out; the next seven are blue; the others are grey.
    colors = [ORANGE, *[BLUE] * (NAMED_LAYERS - 1), *[FAINT] * len(order)]
    lines = []
    for layer, color in zip(order, colors, strict=False):
        lines.append(_layer_curve(layer, curves[layer], shown_by, color))
    first, last = order[0], order[-1]
    return Figure(
        f"Sensitivity: {name}",
        f"{shown_by.title} when one layer alone is cut to a density. The most sensitive is "
        f"{first} (orange), {shown_by.formatted(worst[first])} at its worst; the least sensitive "
        f"is {last}, {shown_by.formatted(worst[last])}. The {min(NAMED_LAYERS, len(order))} "
        f"most sensitive of {len(order)} layers are coloured.",
        Axis("kept of this layer (%)"),
        # Reversed, because the line drawn last is on top: it shall be the most sensitive layer's.
        [Panel(score_axis(shown_by), lines[::-1])],
        height=380,
    )


def _curves(points: list[Json], shown_by: MetricFormat) -> dict[str, list[Json]]:
    """Returns the points of each layer, sorted by density."""
    curves: dict[str, list[Json]] = {}
    for point in points:
        if units.number(point.get("density")) is not None and shown_by.value(point) is not None:
            curves.setdefault(str(point.get("layer")), []).append(point)
    for curve in curves.values():
        curve.sort(key=lambda point: float(point["density"]))
    return curves


def _layer_curve(layer: str, curve: list[Json], shown_by: MetricFormat, color: Color) -> Series:
    x, y = values(curve, "density", 100), values(curve, shown_by.key, shown_by.scale)
    hover = []
    for across, up in zip(x, y, strict=True):
        hover.append(f"{layer}: {short(across)}% kept, {shown_by.format_scaled(up or 0)}")
    return Series("line", layer, x, y, color, hover)


def density_over_epochs(name: str, epochs: list[Json]) -> Figure | None:
    """Draws the density over the epochs, and below it lambda, the weight of a penalty on density.

    Returns None if no epoch records a density.
    """
    # An l0 stage records the density that its gates have on average, and lambda.
    expected = values(epochs, "expected_density", 100)
    weight = values(epochs, "lambda_")
    density = [
        settled if settled is not None else mean
        for settled, mean in zip(values(epochs, "density", 100), expected, strict=True)
    ]
    # Only stages that prune or sparsify over several epochs record a density.
    known = [d for d in density if d is not None]
    if not known:
        return None
    x = [float(at) for at in range(1, len(epochs) + 1)]
    kept = f"Kept weights or channels over {len(epochs)} epochs"
    caption = f"{kept}: from {known[0]:.1f}% to {known[-1]:.1f}%"
    top = Panel(Axis("kept (%)", low=0.0), [line("kept", x, density, unit="%", across="epoch")])
    title = f"Density: {name}"
    # Only the l0 stage has a penalty.
    if all(w is None for w in weight):
        return Figure(title, f"{caption}.", Axis("epoch"), [top], together=True)
    below = Panel(Axis("λ", low=0.0), [line("λ", x, weight, color=ORANGE, across="epoch")])
    caption = f"{caption}; below it the weight λ of the penalty."
    return Figure(title, caption, Axis("epoch"), [top, below], height=380, together=True)


def bits_per_layer(name: str, records: list[Json]) -> Figure | None:
    """Draws a bar for each quantized layer: the bits of one weight."""
    layers = _quantized_layers(records)
    if not layers:
        return None
    names, bits = [str(layer.get("name")) for layer in layers], values(layers, "bits")
    sizes = [w or 0.0 for w in values(layers, "weights")]
    total = 0.0
    labels, hover = [], []
    for layer, width, size in zip(names, bits, sizes, strict=True):
        total += (width or 0.0) * size
        labels.append(f"{width or 0.0:.0f} · {units.count(size)}")
        hover.append(f"{layer}: {short(width)} bits, {units.count(size)} weights")
    # The mean is over weights, not layers, because every weight takes its bits in the file.
    mean = total / sum(sizes) if sum(sizes) else 0.0
    return Figure(
        f"Bits of the weights: {name}",
        f"{mean:.2f} bits a weight on average over {len(layers)} layers; beside each bar its "
        "bits and how many weights it has.",
        Axis("bits", low=0.0),
        [Panel(Axis("", names=names), [horizontal_bars("bits", bits, hover=hover, labels=labels)])],
        height=rows_height(len(names)),
        wide=True,
    )


def _quantized_layers(records: list[Json]) -> list[Json]:
    """Returns the layers whose bits are known, from the last record that has quantized layers."""
    # A resumed stage may have written the record twice.
    for record in reversed(records):
        found = record.get("quantized")
        if isinstance(found, list):
            layers = [layer for layer in found if isinstance(layer, dict)]
            return [layer for layer in layers if units.number(layer.get("bits")) is not None]
    return []


def bytes_by_kind(stage: Json) -> Figure | None:
    """Draws a bar for each kind of content of a packed file, such as weights, scales, header."""
    found = stage.get("packed_bytes")
    pairs = []
    for kind, value in found.items() if isinstance(found, dict) else ():
        size = units.number(value)
        if size:
            pairs.append((str(kind), size))
    # Only a packed file has this entry.
    if not pairs:
        return None

    # The largest first: it is what a reader can make smaller.
    pairs.sort(key=lambda pair: -pair[1])
    largest, most = pairs[0]
    prefix, unit = units.scale(most)
    labels = [units.size(size) for _, size in pairs]
    names = [kind for kind, _ in pairs]
    hover = [f"{kind}: {text}" for kind, text in zip(names, labels, strict=True)]
    lengths = [size / unit for _, size in pairs]
    return Figure(
        f"Bytes of the packed file: {name_of(stage)}",
        f"{units.size(stage.get('file_bytes'))} in all; the most goes into {largest}, "
        f"{units.size(most)}.",
        Axis(f"{prefix}B", low=0.0),
        [
            Panel(
                Axis("", names=names),
                [horizontal_bars("bytes", lengths, hover=hover, labels=labels)],
            )
        ],
        height=rows_height(len(names)),
    )
