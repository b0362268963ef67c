"""The figures of a report: one small function each, from records to a plot; no data, no figure."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.compression import (
    bits_per_layer,
    bytes_by_kind,
    density_over_epochs,
    sensitivity_curves,
)
from fedpress.reports.federated import (
    bytes_over_rounds,
    client_scores,
    score_over_bytes,
    score_over_rounds,
)
from fedpress.reports.metrics import Shown
from fedpress.reports.plot import (
    FAINT,
    ORANGE,
    Axis,
    Figure,
    Note,
    Panel,
    Series,
    line,
    lying_bars,
    total_of,
    values,
)
from fedpress.reports.reading import Json, Run, records_by_stage


def figures(run: Run) -> list[Figure]:
    """Returns all figures that the folder has data for, in the order of the stages."""
    found: list[Figure | None] = [
        score_and_size([*([run.before] if run.before else []), *run.stages])
    ]
    for steps in records_by_stage(run.records):
        epochs, rounds = [s for s in steps if "epoch" in s], [s for s in steps if "round" in s]
        name = str(steps[-1].get("name") or steps[-1].get("kind"))
        found += [training_curve(name, epochs), density_over_epochs(name, epochs)]
        found += [
            score_over_rounds(name, rounds),
            score_over_bytes(name, rounds),
            bytes_over_rounds(name, rounds),
            channels_kept(name, next((r for r in reversed(steps) if "layers" in r), {})),
            sensitivity_curves(name, steps),
            bits_per_layer(name, steps),
        ]
    found += [bytes_by_kind(stage) for stage in run.stages]
    found += [client_scores(stage) for stage in run.stages]
    return [figure for figure in found if figure]


def score_and_size(stages: list[Json]) -> Figure | None:
    """Shows what each stage did to the primary metric and the file size."""
    metric = Shown.of(stages)
    shown = [s for s in stages if metric.value(s) is not None and units.number(s.get("file_bytes"))]
    if len(shown) < 2:
        return None
    prefix, unit = units.scale(max(s["file_bytes"] for s in shown))
    size = [s["file_bytes"] / unit for s in shown]
    score = [s[metric.key] * metric.scale for s in shown]
    names = [f"{i}. {s.get('name') or s.get('kind')}" for i, s in enumerate(shown, start=1)]
    hover = [
        f"{n}: {units.count(s['file_bytes'], 'B')}, {metric.drawn(a)}"
        for n, s, a in zip(names, shown, score, strict=True)
    ]
    path = Series(
        "line",
        "stage",
        size,
        score,
        FAINT,
        hover,
        beside=_shared_labels(size, score, names),
        dotted=True,
    )
    steps = ", ".join(
        f"{s.get('name') or s.get('kind')} {metric.formatted(s[metric.key])} with {units.count(s['file_bytes'], 'B')}"
        for s in shown
    )
    return Figure(
        f"{metric.title} against size",
        f"Test {metric.name} and file size after each stage: {steps}.",
        Axis(f"file ({prefix}B)", low=0.0),
        [Panel(Axis(metric.axis("test")), [path])],
        height=340,
        wide=True,
    )


def _shared_labels(x: list[float], y: list[float], names: list[str]) -> list[str]:
    """Returns a label for each point; stages that hardly moved the point share the label of the first of them."""
    near_x, near_y = 0.05 * max(x), 0.08 * (max(y) - min(y)) + 1e-9
    labels = [""] * len(names)
    for at, name in enumerate(names):
        leader = next(
            i for i in range(at + 1) if abs(x[i] - x[at]) < near_x and abs(y[i] - y[at]) < near_y
        )
        leader = next((i for i in range(at) if labels[i] and i == leader), at)
        labels[leader] = f"{labels[leader]}\n{name}" if labels[leader] else name
    return labels


def training_curve(name: str, epochs: list[Json]) -> Figure | None:
    """Shows the primary metric and the loss over the epochs of one stage, with the image sizes."""
    if not epochs:
        return None
    shown = Shown.of(epochs)
    x, score = values(epochs, "epoch"), values(epochs, shown.key, shown.scale)
    sizes = list(dict.fromkeys(str(e["image_size"]) for e in epochs if e.get("image_size")))
    growth = f", at image sizes {' → '.join(sizes)} pixels" if len(sizes) > 1 else ""
    rules, notes = _image_sizes(epochs)
    return Figure(
        f"Training: {name}",
        f"Validation {shown.name} {shown.from_to(score)} over {len(epochs)} epochs{growth}; the loss is below.",
        Axis("epoch"),
        [
            Panel(
                Axis(shown.axis("validation")),
                [line(shown.name, x, score, unit=shown.unit, across="epoch")],
            ),
            Panel(
                Axis("loss"),
                [line("loss", x, values(epochs, "loss"), color=ORANGE, across="epoch")],
            ),
        ],
        notes=notes,
        rules=rules,
        height=380,
        together=True,
    )


def _image_sizes(epochs: list[Json]) -> tuple[list[float], list[Note]]:
    """Returns where the image size changes, and the sizes in words."""
    sizes = [units.number(e.get("image_size")) for e in epochs]
    changes = [i for i, size in enumerate(sizes) if size and (i == 0 or size != sizes[i - 1])]
    starts = [(units.number(epochs[i].get("epoch")) or 0.0, sizes[i]) for i in changes]
    if len(starts) < 2:
        return [], []
    return [at - 0.5 for at, _ in starts[1:]], [
        Note(at, None, f"{size:.0f} px") for at, size in starts
    ]


def channels_kept(name: str, record: Json) -> Figure | None:
    """Shows how many channels every layer kept."""
    found = record.get("layers")
    layers = (
        [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []
    )
    layers = [layer for layer in layers if (units.number(layer.get("before")) or 0.0) > 0]
    if not layers:
        return None
    names = [str(layer.get("name")) for layer in layers]
    before, after = values(layers, "before"), values(layers, "after")
    texts = [f"{a or 0:.0f}/{b or 0:.0f}" for a, b in zip(after, before, strict=True)]
    hover = [f"{name}: {text} kept" for name, text in zip(names, texts, strict=True)]
    share = total_of(after) / total_of(before)
    return Figure(
        f"Channels kept: {name}",
        f"{units.percent(share, 1)} of all channels were kept; the bars show {len(layers)} layers before and after.",
        Axis("channels", low=0.0),
        [
            Panel(
                Axis("", names=names),
                [
                    lying_bars("before", before, hover=hover, beside=texts, color=FAINT),
                    lying_bars("kept", after, hover=hover),
                ],
            )
        ],
        height=110 + (24 if len(layers) < 40 else 16) * len(layers),
        wide=True,
        legend=True,
    )
