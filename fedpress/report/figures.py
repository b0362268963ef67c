"""The figures of a report: one small function each, from records to a plot; no data, no figure."""

from __future__ import annotations

from fedpress.report import units
from fedpress.report.compression import bits_per_layer, bytes_by_kind, density_over_epochs, sensitivity_curves
from fedpress.report.federated import accuracy_over_bytes, accuracy_over_rounds, bytes_over_rounds, client_accuracy
from fedpress.report.plot import (
    BLUE,
    FAINT,
    ORANGE,
    Figure,
    Spec,
    axis,
    from_to,
    label,
    line,
    lying_bars,
    names_axis,
    note,
    spec,
    total_of,
    two_panels,
    values,
)
from fedpress.report.reading import Json, Run, records_by_stage


def figures(run: Run) -> list[Figure]:
    """Returns all figures that the folder has data for, in the order of the stages."""
    found: list[Figure | None] = [accuracy_and_size([*([run.before] if run.before else []), *run.stages])]
    for steps in records_by_stage(run.records):
        epochs, rounds = [s for s in steps if "epoch" in s], [s for s in steps if "round" in s]
        name = str(steps[-1].get("name") or steps[-1].get("kind"))
        found += [training_curve(name, epochs), density_over_epochs(name, epochs)]
        found += [
            accuracy_over_rounds(name, rounds),
            accuracy_over_bytes(name, rounds),
            bytes_over_rounds(name, rounds),
            channels_kept(name, next((r for r in reversed(steps) if "layers" in r), {})),
            sensitivity_curves(name, steps),
            bits_per_layer(name, steps),
        ]
    found += [bytes_by_kind(stage) for stage in run.stages]
    found += [client_accuracy(stage) for stage in run.stages]
    return [figure for figure in found if figure]


def accuracy_and_size(stages: list[Json]) -> Figure | None:
    """Shows what each stage did to accuracy and file size."""
    shown = [s for s in stages if units.number(s.get("accuracy")) is not None and units.number(s.get("file_bytes"))]
    if len(shown) < 2:
        return None
    prefix, unit = units.scale(max(s["file_bytes"] for s in shown))
    size, accuracy = [s["file_bytes"] / unit for s in shown], [s["accuracy"] * 100 for s in shown]
    names = [f"{i}. {label(s.get('name') or s.get('kind'))}" for i, s in enumerate(shown, start=1)]
    path = line("stage", size, accuracy)
    path |= {
        "text": names,
        "hovertemplate": f"%{{text}}<br>%{{x:.4~g}} {prefix}B<br>%{{y:.2f}}%<extra></extra>",
    }
    path["line"] = {"color": FAINT, "width": 1.5, "dash": "dot"}
    path["marker"] = {"color": BLUE, "size": 9}
    steps = ", ".join(
        f"{s.get('name') or s.get('kind')} {units.percent(s['accuracy'])} with {units.count(s['file_bytes'], 'B')}"
        for s in shown
    )
    return Figure(
        "Accuracy against size",
        f"Test accuracy and file size after each stage: {steps}.",
        spec(
            [path],
            x=axis(f"file ({prefix}B)", rangemode="tozero"),
            y=axis("test accuracy (%)"),
            hovermode="closest",
            annotations=_point_labels(size, accuracy, names),
        ),
        wide=True,
    )


def _point_labels(x: list[float], y: list[float], names: list[str]) -> list[Spec]:
    """Names beside the points; stages that hardly moved the point share one label."""
    near_x, near_y = 0.05 * max(x), 0.08 * (max(y) - min(y)) + 1e-9
    groups: list[tuple[float, float, list[str]]] = []
    for a, b, name in zip(x, y, names, strict=True):
        near = next((group for group in groups if abs(group[0] - a) < near_x and abs(group[1] - b) < near_y), None)
        if near:
            near[2].append(name)
        else:
            groups.append((a, b, [name]))
    right, left = {"xanchor": "left", "xshift": 10, "align": "left"}, {"xanchor": "right", "xshift": -10}
    return [note(a, b, "<br>".join(texts), **(left if a > max(x) / 2 else right)) for a, b, texts in groups]


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
        f"Validation accuracy {from_to(accuracy)} over {len(epochs)} epochs{growth}; the loss is below.",
        two_panels(
            data, x=axis("epoch"), top=axis("validation<br>accuracy (%)"), bottom=axis("loss"), **_image_sizes(epochs)
        ),
        height=380,
    )


def _image_sizes(epochs: list[Json]) -> Spec:
    """Marks the epochs at which the image size changes."""
    sizes = [units.number(e.get("image_size")) for e in epochs]
    changes = [i for i, size in enumerate(sizes) if size and (i == 0 or size != sizes[i - 1])]
    starts = [(units.number(epochs[i].get("epoch")) or 0.0, sizes[i]) for i in changes]
    if len(starts) < 2:
        return {}
    style = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": FAINT, "width": 1, "dash": "dot"}}
    rules = [{"x0": at - 0.5, "x1": at - 0.5, **style} for at, _ in starts[1:]]
    notes = [note(at, 1, f"{size:.0f} px", yref="paper", yanchor="bottom") for at, size in starts]
    return {"shapes": rules, "annotations": notes}


def channels_kept(name: str, record: Json) -> Figure | None:
    """Shows how many channels every layer kept."""
    found = record.get("layers")
    layers = [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []
    layers = [layer for layer in layers if units.number(layer.get("before"))]
    if not layers:
        return None
    names = [str(layer.get("name")) for layer in layers]
    before, after = values(layers, "before"), values(layers, "after")
    texts = [f"{a or 0:.0f}/{b or 0:.0f}" for a, b in zip(after, before, strict=True)]
    quiet = {"hoverinfo": "skip", "showlegend": True}
    data = [
        lying_bars("before", names, before, color=FAINT, text=texts, textposition="outside", cliponaxis=False, **quiet),
        lying_bars("kept", names, after, showlegend=True, hovertemplate="%{hovertext}: %{x} kept<extra></extra>"),
    ]
    x = axis("channels", range=[0, 1.35 * max(b or 0.0 for b in before)])
    share = total_of(after) / total_of(before)
    return Figure(
        f"Channels kept: {name}",
        f"{units.percent(share, 1)} of all channels were kept; the bars show {len(layers)} layers before and after.",
        spec(data, x=x, y=names_axis(names), barmode="overlay", bargap=0.35, hovermode="closest"),
        height=110 + (24 if len(layers) < 40 else 16) * len(layers),
        wide=True,
    )
