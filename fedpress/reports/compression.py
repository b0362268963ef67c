"""The figures of compression: sensitivity of layers, density over the training, bits and bytes of what is stored."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.metrics import Shown
from fedpress.reports.plot import (
    BLUE,
    FAINT,
    ORANGE,
    Axis,
    Color,
    Figure,
    Panel,
    Series,
    line,
    lying_bars,
    short,
    values,
)
from fedpress.reports.reading import Json

MANY_LAYERS = 8  # so many lines are named; the others stay grey


def sensitivity_curves(name: str, records: list[Json]) -> Figure | None:
    """Shows the metric against density for every layer alone; the most sensitive ones are coloured and named."""
    points = [point for record in records if isinstance(point := record.get("sensitivity"), dict)]
    shown_by = Shown.of(points)
    curves: dict[str, list[Json]] = {}
    for point in points:
        if units.number(point.get("density")) is not None and shown_by.value(point) is not None:
            curves.setdefault(str(point.get("layer")), []).append(point)
    if not curves:
        return None
    for curve in curves.values():
        curve.sort(key=lambda point: float(point["density"]))
    higher = shown_by.metric.better == "higher"
    worst = min if higher else max
    lowest = {
        layer: worst(float(p[shown_by.key]) for p in curve) for layer, curve in curves.items()
    }
    order = sorted(curves, key=lambda layer: lowest[layer], reverse=not higher)
    colors = [ORANGE, *[BLUE] * (MANY_LAYERS - 1), *[FAINT] * len(order)]
    lines = [
        _layer_curve(layer, curves[layer], shown_by, color)
        for layer, color in zip(order, colors, strict=False)
    ]
    shown = lines[::-1]  # the most sensitive is drawn last, on top
    first, last = order[0], order[-1]
    return Figure(
        f"Sensitivity: {name}",
        f"{shown_by.title} when one layer alone is cut to a density. The most sensitive is {first}, orange, down to "
        f"{shown_by.formatted(lowest[first])}; the least is {last}, {shown_by.formatted(lowest[last])} at its worst. "
        f"The {min(MANY_LAYERS, len(order))} most sensitive of {len(order)} layers are coloured.",
        Axis("kept of this layer (%)"),
        [Panel(Axis(shown_by.axis()), shown)],
        height=380,
    )


def _layer_curve(layer: str, curve: list[Json], shown_by: Shown, color: Color) -> Series:
    x, y = values(curve, "density", 100), values(curve, shown_by.key, shown_by.scale)
    hover = []
    for across, up in zip(x, y, strict=True):
        hover.append(f"{layer}: {short(across)}% kept, {shown_by.drawn(up or 0)}")
    return Series("line", layer, x, y, color, hover)


def density_over_epochs(name: str, epochs: list[Json]) -> Figure | None:
    """Shows the density while a schedule or a penalty lowers it, with lambda below where there is one."""
    density, weight = values(epochs, "density", 100), values(epochs, "lambda")
    known = [d for d in density if d is not None]
    if not known:
        return None
    x = [float(at) for at in range(1, len(epochs) + 1)]
    caption = f"Kept weights or channels over {len(epochs)} epochs: from {known[0]:.1f}% to {known[-1]:.1f}%"
    top = Panel(Axis("kept (%)", low=0.0), [line("kept", x, density, unit="%", across="epoch")])
    title = f"Density: {name}"
    if all(w is None for w in weight):
        return Figure(title, f"{caption}.", Axis("epoch"), [top], together=True)
    below = Panel(Axis("λ", low=0.0), [line("λ", x, weight, color=ORANGE, across="epoch")])
    said = f"{caption}; below it the weight λ of the penalty."
    return Figure(title, said, Axis("epoch"), [top, below], height=380, together=True)


def bits_per_layer(name: str, records: list[Json]) -> Figure | None:
    """Shows the bits of each layer's weights."""
    layers = _quantized_layers(records)
    if not layers:
        return None
    names, bits = [str(x.get("name")) for x in layers], values(layers, "bits")
    sizes = [w or 0.0 for w in values(layers, "weights")]
    total = 0.0
    notes, hover = [], []
    for layer, width, size in zip(names, bits, sizes, strict=True):
        total += (width or 0.0) * size
        notes.append(f"{width or 0.0:.0f} · {units.count(size)}")
        hover.append(f"{layer}: {short(width)} bits, {units.count(size)} weights")
    mean = total / sum(sizes) if sum(sizes) else 0.0
    return Figure(
        f"Bits of the weights: {name}",
        f"{mean:.2f} bits a weight on average over {len(layers)} layers; beside each bar its bits and how many weights "
        "it has.",
        Axis("bits", low=0.0),
        [Panel(Axis("", names=names), [lying_bars("bits", bits, hover=hover, beside=notes)])],
        height=110 + (24 if len(names) < 40 else 16) * len(names),
        wide=True,
    )


def _quantized_layers(records: list[Json]) -> list[Json]:
    """Returns what the last record about quantized layers says of each whose bits it tells."""
    for record in reversed(records):
        found = record.get("quantized")
        if isinstance(found, list):
            layers = [x for x in found if isinstance(x, dict)]
            return [x for x in layers if units.number(x.get("bits")) is not None]
    return []


def bytes_by_kind(stage: Json) -> Figure | None:
    """Shows what the bytes of a packed file are spent on."""
    found = stage.get("packed_bytes")
    pairs = (
        [(str(k), x) for k, v in found.items() if (x := units.number(v))]
        if isinstance(found, dict)
        else []
    )
    if not pairs:
        return None
    pairs.sort(key=lambda pair: -pair[1])
    prefix, size = units.scale(pairs[0][1])
    names = [name for name, _ in pairs]
    texts = [units.count(x, "B") for _, x in pairs]
    bar = lying_bars(
        "bytes",
        [x / size for _, x in pairs],
        hover=[f"{name}: {text}" for name, text in zip(names, texts, strict=True)],
        beside=texts,
    )
    return Figure(
        f"Bytes of the packed file: {stage.get('name') or stage.get('kind')}",
        f"{units.count(stage.get('file_bytes'), 'B')} in all; the most goes into {names[0]}, "
        f"{units.count(pairs[0][1], 'B')}.",
        Axis(f"{prefix}B", low=0.0),
        [Panel(Axis("", names=names), [bar])],
        height=110 + 24 * len(names),
    )
