"""Recurrent layers: a hidden unit is one row in every gate of every layer and direction, and a column that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Ids, Value, sizes
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(
    ids: Ids,
    shape: Shape,
    x: Value,
    start: Any,
    weights: Sequence[Value],
    bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
    *rest: Any,
) -> list[Axes]:
    """The torch modules have one hidden size, so all layers and directions lose the same places."""
    ways = 2 if both else 1
    states = list(start) if isinstance(start, list | tuple) else [start]
    per = len(weights) // (layers * ways)
    steps = int(np.prod(x.shape[:-1]))
    if per != (4 if bias else 2):
        for value in (*weights, x, *states):
            for axis in value.axes if isinstance(value, Value) else ():
                ids.keep(axis, "a projected state")
        for matrix in (w for w in weights if len(w.shape) == 2):
            ids.mark(matrix.axes[0], "write")
            ids.multiply(steps, *matrix.shape)
        return [(None,) * len(x.shape)] * (1 + len(states))
    hidden = weights[1].axes[1]
    assert hidden is not None, "parameters have ids"
    for i in range(layers * ways):
        source = x.axes[-1] if i < ways else np.tile(hidden, ways)
        w_ih, w_hh, *biases = weights[i * per : (i + 1) * per]
        _cell(ids, steps, source, hidden, w_ih, w_hh, biases)
    for state in states:
        if isinstance(state, Value):
            ids.unite(state.axes[-1], hidden)
    after: list[Axes] = [(None,) * (len(x.shape) - 1) + (hidden,)] * len(states)
    return [(*x.axes[:-1], np.tile(hidden, ways)), *after]


@rule("lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default")
def cell(
    ids: Ids, shape: Shape, x: Value, start: Any, w_ih: Value, w_hh: Value, *biases: Any
) -> Axes | list[Axes]:
    """One step; an LSTM gives two states."""
    hidden = w_hh.axes[1]
    assert hidden is not None, "parameters have ids"
    _cell(
        ids,
        int(np.prod(x.shape[:-1])),
        x.axes[-1],
        hidden,
        w_ih,
        w_hh,
        [b for b in biases if b is not None],
    )
    states = list(start) if isinstance(start, list | tuple) else [start]
    for state in states:
        ids.unite(state.axes[-1], hidden)
    axes = (*x.axes[:-1], hidden)
    return [axes, axes] if len(states) > 1 else axes


def _cell(
    ids: Ids,
    steps: int,
    source: Any,
    hidden: Any,
    w_ih: Value,
    w_hh: Value,
    biases: Sequence[Value],
) -> None:
    gates = w_hh.shape[0] // w_hh.shape[1]
    ids.unite(w_ih.axes[1], source)
    ids.unite(w_hh.axes[1], hidden)
    ids.mark(w_ih.axes[1], "read")
    ids.mark(w_hh.axes[1], "read")
    for rows in (w_ih, w_hh):
        ids.unite(rows.axes[0], np.tile(hidden, gates))
        ids.mark(rows.axes[0], "write")
        ids.multiply(steps, *sizes(rows.shape, rows.axes))
    for bias in biases:
        ids.unite(bias.axes[0], np.tile(hidden, gates))
