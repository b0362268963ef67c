"""The figures of a report: one small function each, from records to a plot; no data, no figure."""

from __future__ import annotations

from fedpress.report import units
from fedpress.report.plot import (
    BLUE,
    FAINT,
    ORANGE,
    TEXT,
    Figure,
    Spec,
    axis,
    bars,
    label,
    line,
    lying_bars,
    spec,
    two_panels,
    values,
)
from fedpress.report.reading import Json, Run, records_by_stage

MANY_CLIENTS = 40  # above this, bars with names cannot be read: show the distribution


def figures(run: Run) -> list[Figure]:
    """Returns all figures that the folder has data for, in the order of the stages."""
    found: list[Figure | None] = [accuracy_and_parameters(run.stages)]
    for steps in records_by_stage(run.records):
        epochs, rounds = [s for s in steps if "epoch" in s], [s for s in steps if "round" in s]
        name = str(steps[-1].get("name") or steps[-1].get("kind"))
        found += [training_curve(name, epochs), channels_kept(name, steps[-1])]
        found += [accuracy_over_rounds(name, rounds), bytes_over_rounds(name, rounds)]
    found += [client_accuracy(stage) for stage in run.stages]
    return [figure for figure in found if figure]


def accuracy_and_parameters(stages: list[Json]) -> Figure | None:
    """Shows what each stage did to accuracy and size."""
    shown = [s for s in stages if units.number(s.get("accuracy")) is not None and units.number(s.get("parameters"))]
    if len(shown) < 2:
        return None
    parameters, accuracy = values(shown, "parameters", 1e-6), values(shown, "accuracy", 100)
    names = [f"{i}. {label(s.get('name') or s.get('kind'))}" for i, s in enumerate(shown, start=1)]
    path = line("stage", parameters, accuracy)
    path |= {"text": names, "hovertemplate": "%{text}<br>%{x:.4~g} M parameters<br>%{y:.2f}%<extra></extra>"}
    path["line"] = {"color": FAINT, "width": 1.5, "dash": "dot"}
    path["marker"] = {"color": BLUE, "size": 9}
    steps = ", ".join(
        f"{s.get('name') or s.get('kind')} {units.percent(s['accuracy'])} with {units.count(s['parameters'])}"
        for s in shown
    )
    x = axis("parameters (millions)", rangemode="tozero")
    return Figure(
        "Accuracy against size",
        f"Test accuracy and parameters after each stage: {steps}.",
        spec(
            [path],
            x=x,
            y=axis("test accuracy (%)"),
            hovermode="closest",
            annotations=_point_labels(parameters, accuracy, names),
        ),
        wide=True,
    )


def _point_labels(x: list[float | None], y: list[float | None], names: list[str]) -> list[Spec]:
    """Labels at the points; stages that did not move the point share one label."""
    merged: dict[tuple[float | None, float | None], list[str]] = {}
    for a, b, name in zip(x, y, names, strict=True):
        merged.setdefault((a, b), []).append(name)
    widest = max(a or 0.0 for a in x)
    return [
        {
            "x": a,
            "y": b,
            "text": ", ".join(texts),
            "showarrow": False,
            "xanchor": "right" if (a or 0.0) > widest / 2 else "left",
            "xshift": -10 if (a or 0.0) > widest / 2 else 10,
            "font": {"color": TEXT, "size": 12},
        }
        for (a, b), texts in merged.items()
    ]


def training_curve(name: str, epochs: list[Json]) -> Figure | None:
    """Shows accuracy and loss over the epochs of one stage, with the image sizes."""
    if not epochs:
        return None
    x, accuracy = values(epochs, "epoch"), values(epochs, "accuracy", 100)
    data = [
        line("validation accuracy", x, accuracy, unit="%"),
        line("loss", x, values(epochs, "loss"), color=ORANGE, panel=2),
    ]
    sizes = list(dict.fromkeys(str(e["image_size"]) for e in epochs if e.get("image_size")))
    growth = f", at image sizes {' → '.join(sizes)} pixels" if len(sizes) > 1 else ""
    return Figure(
        f"Training: {name}",
        f"Validation accuracy {_from_to(accuracy)} over {len(epochs)} epochs{growth}; the loss is below.",
        two_panels(
            data, x=axis("epoch"), top=axis("validation<br>accuracy (%)"), bottom=axis("loss"), **_image_sizes(epochs)
        ),
        height=380,
    )


def _from_to(numbers: list[float | None]) -> str:
    known = [n for n in numbers if n is not None]
    return f"from {known[0]:.2f}% to {known[-1]:.2f}%" if known else "was not measured"


def _image_sizes(epochs: list[Json]) -> Spec:
    """Marks the epochs at which the image size changes."""
    sizes = [units.number(e.get("image_size")) for e in epochs]
    changes = [i for i, size in enumerate(sizes) if size and (i == 0 or size != sizes[i - 1])]
    starts = [(units.number(epochs[i].get("epoch")) or 0.0, sizes[i]) for i in changes]
    if len(starts) < 2:
        return {}
    rules = [
        {
            "type": "line",
            "x0": at - 0.5,
            "x1": at - 0.5,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": FAINT, "width": 1, "dash": "dot"},
        }
        for at, _ in starts[1:]
    ]
    notes = [
        {
            "x": at,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "text": f"{size:.0f} px",
            "showarrow": False,
            "font": {"color": TEXT, "size": 11},
        }
        for at, size in starts
    ]
    return {"shapes": rules, "annotations": notes}


def channels_kept(name: str, record: Json) -> Figure | None:
    """Shows how many channels every layer kept."""
    layers = record.get("layers")
    layers = (
        [x for x in layers if isinstance(x, dict) and units.number(x.get("before"))] if isinstance(layers, list) else []
    )
    if not layers:
        return None
    names, before, after = (
        [str(layer.get("name")) for layer in layers],
        values(layers, "before"),
        values(layers, "after"),
    )
    texts = [f"{layer.get('after')} of {layer.get('before')}" for layer in layers]
    quiet = {"hoverinfo": "skip", "showlegend": True}
    data = [
        lying_bars("before", names, before, color=FAINT, text=texts, textposition="outside", cliponaxis=False, **quiet),
        lying_bars("kept", names, after, showlegend=True, hovertemplate="%{y}: %{x} kept<extra></extra>"),
    ]
    x = axis("channels", range=[0, 1.3 * max(b or 0.0 for b in before)])
    y = axis("", autorange="reversed", type="category", ticks="", automargin=True)
    share = _sum(after) / _sum(before)
    return Figure(
        f"Channels kept: {name}",
        f"Of all channels {units.percent(share, 1)} were kept; the bars show the {len(layers)} layers before and after.",
        spec(data, x=x, y=y, barmode="overlay", bargap=0.35, hovermode="closest"),
        height=110 + 24 * len(layers),
        wide=True,
    )


def accuracy_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Shows accuracy over the rounds with the epsilon that was spent for it."""
    if not rounds:
        return None
    x, accuracy, spent = values(rounds, "round"), values(rounds, "accuracy", 100), values(rounds, "epsilon")
    caption = f"Validation accuracy {_from_to(accuracy)} over {len(rounds)} rounds"
    top = line("accuracy", x, accuracy, unit="%")
    if all(e is None for e in spent):
        plot = spec([top], x=axis("round"), y=axis("validation accuracy (%)"))
        return Figure(f"Rounds: {name}", f"{caption}, without differential privacy.", plot)
    data = [top, line("ε spent", x, spent, color=ORANGE, panel=2)]
    last = next(e for e in reversed(spent) if e is not None)
    return Figure(
        f"Rounds: {name}",
        f"{caption}; below it the privacy spent so far, ε = {units.epsilon(last)} at the end.",
        two_panels(
            data, x=axis("round"), top=axis("validation<br>accuracy (%)"), bottom=axis("ε spent", rangemode="tozero")
        ),
        height=380,
    )


def bytes_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Shows bytes up and down per round, and their sum so far."""
    up, down = values(rounds, "bytes_up"), values(rounds, "bytes_down")
    if not any(up) and not any(down):
        return None
    unit, size = _byte_unit(max(b or 0.0 for b in up + down))
    total_unit, total_size = _byte_unit(_sum(up + down))
    x, data = values(rounds, "round"), []
    for word, sent, color in (("up", up, BLUE), ("down", down, ORANGE)):
        data.append(bars(word, x, [b and b / size for b in sent], color=color, unit=f" {unit}"))
        total = [_sum(sent[: i + 1]) / total_size for i in range(len(sent))]
        area = line(f"{word}, so far", x, total, color=color, unit=f" {total_unit}", panel=2)
        data.append({**area, "mode": "lines", "stackgroup": "total", "showlegend": False})
    return Figure(
        f"Bytes sent: {name}",
        f"{units.count(_sum(up), 'B')} up to the server and {units.count(_sum(down), 'B')} down to the clients in"
        f" {len(rounds)} rounds; each round above, the sum so far below.",
        two_panels(
            data,
            x=axis("round"),
            top=axis(f"per round<br>({unit})"),
            bottom=axis(f"so far<br>({total_unit})"),
            barmode="stack",
            bargap=0.25,
            showlegend=True,
        ),
        height=380,
    )


def _sum(numbers: list[float | None]) -> float:
    return sum(n for n in numbers if n is not None)


def _byte_unit(largest: float) -> tuple[str, float]:
    return next(((f"{prefix}B", size) for size, prefix in units.PREFIXES if largest >= size), ("B", 1.0))


def client_accuracy(stage: Json) -> Figure | None:
    """Shows how well the final model of a stage does for each client: bars, or a histogram of many."""
    measured = stage.get("client_accuracy")
    measured = measured.items() if isinstance(measured, dict) else ()
    pairs = [(name, 100 * x) for name, x in ((n, units.number(a)) for n, a in measured) if x is not None]
    if not pairs:
        return None
    numbers = sorted(x for _, x in pairs)
    title = f"Accuracy per client: {stage.get('name') or stage.get('kind')}"
    caption = (
        f"{len(pairs)} clients, from {numbers[0]:.2f}% to {numbers[-1]:.2f}%, median {numbers[len(numbers) // 2]:.2f}%."
    )
    if len(pairs) > MANY_CLIENTS:
        data = {
            "type": "histogram",
            "x": numbers,
            "marker": {"color": BLUE},
            "hovertemplate": "%{y} clients at %{x}%<extra></extra>",
        }
        plot = spec([data], x=axis("accuracy (%)"), y=axis("clients"), hovermode="closest", bargap=0.05)
        return Figure(title, caption, plot)
    bar = lying_bars(
        "accuracy", [n for n, _ in pairs], [x for _, x in pairs], hovertemplate="%{y}: %{x:.2f}%<extra></extra>"
    )
    bar |= {"text": [f"{x:.1f}%" for _, x in pairs], "textposition": "outside", "cliponaxis": False}
    plot = spec(
        [bar],
        x=axis("accuracy (%)", range=[0, 115], tickvals=[0, 25, 50, 75, 100]),
        y=axis("", autorange="reversed", type="category", ticks="", automargin=True),
        hovermode="closest",
        bargap=0.35,
    )
    return Figure(title, caption, plot, height=110 + 24 * len(pairs))
