"""The figures of a federated stage: accuracy and privacy over the rounds, bytes, and how each client fares."""

from __future__ import annotations

from fedpress.report import units
from fedpress.report.plot import (
    BLUE,
    ORANGE,
    Figure,
    axis,
    bars,
    from_to,
    line,
    lying_bars,
    names_axis,
    spec,
    total_of,
    two_panels,
    values,
)
from fedpress.report.reading import Json

MANY_CLIENTS = 40  # above this, bars with names cannot be read: show the distribution


def accuracy_over_rounds(name: str, rounds: list[Json]) -> Figure | None:
    """Shows accuracy over the rounds with the epsilon that was spent for it."""
    if not rounds:
        return None
    x, accuracy, spent = values(rounds, "round"), values(rounds, "accuracy", 100), values(rounds, "epsilon")
    caption = f"Validation accuracy {from_to(accuracy)} over {len(rounds)} rounds"
    top = line("accuracy", x, accuracy, unit="%")
    if all(e is None for e in spent):
        plot = spec([top], x=axis("round"), y=axis("validation accuracy (%)"))
        return Figure(f"Accuracy over rounds: {name}", f"{caption}, without differential privacy.", plot)
    data = [top, line("ε spent", x, spent, color=ORANGE, panel=2)]
    last = next(e for e in reversed(spent) if e is not None)
    return Figure(
        f"Accuracy and privacy spent: {name}",
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
    prefix, size = units.scale(max(b or 0.0 for b in up + down))
    total_prefix, total_size = units.scale(total_of(up + down))
    x, data = values(rounds, "round"), []
    for word, sent, color in (("up", up, BLUE), ("down", down, ORANGE)):
        data.append(bars(word, x, [b and b / size for b in sent], color=color, unit=f" {prefix}B"))
        total = [total_of(sent[: i + 1]) / total_size for i in range(len(sent))]
        area = line(f"{word}, so far", x, total, color=color, unit=f" {total_prefix}B", panel=2)
        data.append({**area, "mode": "lines", "stackgroup": "total", "showlegend": False})
    return Figure(
        f"Bytes sent: {name}",
        f"{units.count(total_of(up), 'B')} up to the server and {units.count(total_of(down), 'B')} down to the clients"
        f" in {len(rounds)} rounds; each round above, the sum so far below.",
        two_panels(
            data,
            x=axis("round"),
            top=axis(f"per round<br>({prefix}B)"),
            bottom=axis(f"so far<br>({total_prefix}B)"),
            barmode="stack",
            bargap=0.25,
            showlegend=True,
        ),
        height=380,
    )


def accuracy_over_bytes(name: str, rounds: list[Json]) -> Figure | None:
    """Shows accuracy over all bytes sent so far, up and down: what a connection costs is bytes, not rounds."""
    accuracy = values(rounds, "accuracy", 100)
    sent = [
        (up or 0.0) + (down or 0.0)
        for up, down in zip(values(rounds, "bytes_up"), values(rounds, "bytes_down"), strict=True)
    ]
    if not any(sent) or all(a is None for a in accuracy):
        return None
    prefix, size = units.scale(total_of(sent))
    so_far = [total_of(sent[: i + 1]) / size for i in range(len(sent))]
    path = line("accuracy", so_far, accuracy)
    path["hovertemplate"] = f"%{{y:.2f}}%<br>after %{{x:.4~g}} {prefix}B<extra></extra>"
    return Figure(
        f"Accuracy over bytes: {name}",
        f"Validation accuracy {from_to(accuracy)} for {units.count(total_of(sent), 'B')} up and down together.",
        spec(
            [path],
            x=axis(f"bytes sent, up and down ({prefix}B)", rangemode="tozero"),
            y=axis("validation accuracy (%)"),
            hovermode="closest",
        ),
    )


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
        "accuracy", [n for n, _ in pairs], [x for _, x in pairs], hovertemplate="%{hovertext}: %{x:.2f}%<extra></extra>"
    )
    bar |= {"text": [f"{x:.1f}%" for _, x in pairs], "textposition": "outside", "cliponaxis": False}
    plot = spec(
        [bar],
        x=axis("accuracy (%)", range=[0, 122], tickvals=[0, 25, 50, 75, 100]),
        y=names_axis([name for name, _ in pairs]),
        hovermode="closest",
        bargap=0.35,
    )
    return Figure(title, caption, plot, height=110 + 24 * len(pairs))
