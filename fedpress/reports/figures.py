"""Collects all figures of a run; a function returns None if the run has no data for its figure.

The argument `name` is the name of a stage, and `epochs` are the records of its epochs.
"""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.by_part import by_client, by_part, survival_curves
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
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.plot import (
    FAINT,
    ORANGE,
    Axis,
    Figure,
    Note,
    Panel,
    Series,
    horizontal_bars,
    line,
    rows_height,
    score_axis,
    total_of,
    values,
)
from fedpress.reports.reading import Json, Run, name_of, records_by_stage


def figures(run: Run) -> list[Figure]:
    """Returns all figures that the run folder has data for, in the order of the stages."""
    before = [run.before] if run.before else []
    # First the figure that shows the whole run.
    found: list[Figure | None] = [score_and_size([*before, *run.stages])]
    for steps in records_by_stage(run.records):
        epochs = [step for step in steps if "epoch" in step]
        rounds = [step for step in steps if "round" in step]
        # Pruning in several steps records the layers after each step: the last record has the
        # final layers.
        cut = next((step for step in reversed(steps) if "layers" in step), {})
        name = name_of(steps[-1])
        found += [
            training_curve(name, epochs),
            density_over_epochs(name, epochs),
            score_over_rounds(name, rounds),
            score_over_bytes(name, rounds),
            bytes_over_rounds(name, rounds),
            channels_kept(name, cut),
            sensitivity_curves(name, steps),
            bits_per_layer(name, steps),
        ]
    found += [bytes_by_kind(stage) for stage in run.stages]
    found += [client_scores(stage) for stage in run.stages]
    # Of the last measured model alone: it is the one that is used.
    measured = units.lines_with(run.stages, MetricFormat.of(run.stages).key)[-1:]
    for stage in measured:
        found += [*by_part(stage), by_client(stage), survival_curves(stage)]
    return [figure for figure in found if figure]


def score_and_size(stages: list[Json]) -> Figure | None:
    """Draws the main metric against the file size after each stage."""
    metric = MetricFormat.of(stages)
    shown = []
    for stage in stages:
        if metric.value(stage) is not None and units.number(stage.get("file_bytes")):
            shown.append(stage)
    if len(shown) < 2:
        return None  # one point alone compares nothing
    prefix, unit = units.scale(max(stage["file_bytes"] for stage in shown))
    size = [stage["file_bytes"] / unit for stage in shown]
    score = [stage[metric.key] * metric.scale for stage in shown]
    # Points are numbered, because a path through them may cross itself.
    names, hover, steps = [], [], []
    for number, stage in enumerate(shown, start=1):
        name = name_of(stage)
        value, file = metric.with_error(stage), units.size(stage["file_bytes"])
        names.append(f"{number}. {name}")
        hover.append(f"{number}. {name}: {file}, {value}")
        steps.append(f"{name} {value} with {file}")
    labels = _shared_labels(size, score, names)
    path = Series("line", "stage", size, score, FAINT, hover, labels, dotted=True)
    return Figure(
        f"{metric.title} against size",
        f"Test {metric.name} and file size after each stage: {', '.join(steps)}.",
        Axis(f"file ({prefix}B)", low=0.0),
        [Panel(score_axis(metric, "test"), [path])],
        height=340,
        wide=True,
    )


def _shared_labels(x: list[float], y: list[float], names: list[str]) -> list[str]:
    r"""Returns a label for each point; points almost at the same place share one label.

    >>> _shared_labels([100.0, 40.0, 40.5], [90.0, 80.0, 80.1], ["train", "prune", "tune"])
    ['train', 'prune\ntune', '']
    """
    # Two labels overlap if they are closer than 5% of the width and 8% of the height. The x-axis
    # begins at 0; the y-axis need not. 1e-9 is added because all y may be equal.
    near_x, near_y = 0.05 * max(x), 0.08 * (max(y) - min(y)) + 1e-9
    labels = [""] * len(names)
    for at, name in enumerate(names):
        shared = at
        for earlier in range(at):
            near = abs(x[earlier] - x[at]) < near_x and abs(y[earlier] - y[at]) < near_y
            if near and labels[earlier]:
                shared = earlier
                break
        labels[shared] = f"{labels[shared]}\n{name}" if labels[shared] else name
    return labels


def training_curve(name: str, epochs: list[Json]) -> Figure | None:
    """Draws the main metric and the loss over the epochs.

    If training changes the size of images, vertical lines mark the changes.
    """
    if not epochs:
        return None
    shown = MetricFormat.of(epochs)
    x, score = values(epochs, "epoch"), values(epochs, shown.key, shown.scale)
    sizes = list(dict.fromkeys(str(e["image_size"]) for e in epochs if e.get("image_size")))
    growth = f", at image sizes {' → '.join(sizes)} pixels" if len(sizes) > 1 else ""
    trained = f"over {len(epochs)} epochs{growth}"
    rules, notes = _image_sizes(epochs)
    curve = line(shown.name, x, score, unit=shown.unit, across="epoch")
    loss = line("loss", x, values(epochs, "loss"), color=ORANGE, across="epoch")
    return Figure(
        f"Training: {name}",
        f"Validation {shown.name} {shown.from_to(score)} {trained}; the loss is below.",
        Axis("epoch"),
        [Panel(score_axis(shown, "validation"), [curve]), Panel(Axis("loss"), [loss])],
        notes=notes,
        rules=rules,
        height=380,
        together=True,
    )


def _image_sizes(epochs: list[Json]) -> tuple[list[float], list[Note]]:
    """Returns the epochs where the image size changes, and notes such as "32 px".

    Both are empty if it never changes.
    """
    changes: list[tuple[float, float]] = []
    for epoch in epochs:
        # Epochs of data other than images have no size.
        size = units.number(epoch.get("image_size"))
        if size and (not changes or size != changes[-1][1]):
            changes.append((units.number(epoch.get("epoch")) or 0.0, size))
    if len(changes) < 2:
        return [], []
    # The line stands between the last epoch of one size and the first of the next.
    rules = [at - 0.5 for at, _ in changes[1:]]
    return rules, [Note(at, f"{size:.0f} px") for at, size in changes]


def channels_kept(name: str, record: Json) -> Figure | None:
    """Draws two bars for each pruned layer: its channels before pruning, and the channels kept."""
    layers = _layers(record)
    if not layers:
        return None
    names = [str(layer.get("name")) for layer in layers]
    before, after = values(layers, "before"), values(layers, "after")
    texts, hover = [], []
    for layer, old, new in zip(names, before, after, strict=True):
        text = f"{new or 0:.0f}/{old or 0:.0f}"
        texts.append(text)
        hover.append(f"{layer}: {text} kept")
    # Of all layers together, so a wide layer counts more than a narrow one.
    share = units.percent(total_of(after) / total_of(before), 1)
    rows = [
        horizontal_bars("before", before, hover=hover, labels=texts, color=FAINT),
        horizontal_bars("kept", after, hover=hover),
    ]
    return Figure(
        f"Channels kept: {name}",
        f"{share} of all channels were kept; the bars show {len(layers)} layers before and after.",
        Axis("channels", low=0.0),
        [Panel(Axis("", names=names), rows)],
        height=rows_height(len(layers)),
        wide=True,
        legend=True,
    )


def _layers(record: Json) -> list[Json]:
    """Returns the layers of a record whose number of channels before pruning is above 0."""
    found = record.get("layers")
    layers = []
    for layer in found if isinstance(found, list) else ():
        if isinstance(layer, dict) and (units.number(layer.get("before")) or 0.0) > 0:
            layers.append(layer)
    return layers
