"""Pruning rules of recurrent layers (LSTM, GRU, RNN), whose hidden units are the channels.

A hidden unit is one row of each gate's weights and one column of the weights that read the state.
Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, keeps the ids of channels that cannot be pruned, and returns the ids of the output's axes.
Its argument `shape` is the shape of the output, and `start` has the initial states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import ChannelIds, Value, ids_or_sizes
from fedpress.compress.prune.rules.table import Axes, Shape, rule, values_among


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent_layer(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    start: Any,
    weights: Sequence[Value],
    has_bias: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *rest: Any,
) -> list[Axes]:
    """A torch module such as `nn.LSTM`: all its layers and directions lose the same hidden units.

    The reason is that the module has a single `hidden_size`.
    """
    directions = 2 if bidirectional else 1
    states = _states(start)
    per_cell = len(weights) // (num_layers * directions)
    steps = int(np.prod(x.shape[:-1]))

    if per_cell != (4 if has_bias else 2):
        # With `proj_size` each cell has one more weight, which makes the state narrower than the
        # gates; this case is not pruned.
        _keep_projected(ids, steps, x, weights, states)
        return [(None,) * len(x.shape)] * (1 + len(states))

    hidden = weights[1].axes[1]
    assert hidden is not None, "parameters have ids"
    for i in range(num_layers * directions):
        # Layers after the first read the concatenated hidden units of both directions.
        source = x.axes[-1]
        if i >= directions:
            source = np.tile(hidden, directions)
        # torch lists the weights by layer and direction.
        w_ih, w_hh, *biases = weights[i * per_cell : (i + 1) * per_cell]
        _unite_cell(ids, steps, source, hidden, [w_ih, w_hh], biases)
    for state in values_among(states):
        ids.unite(state.axes[-1], hidden)

    final_state: Axes = (None,) * (len(x.shape) - 1) + (hidden,)
    return [(*x.axes[:-1], np.tile(hidden, directions)), *[final_state] * len(states)]


def _states(start: Any) -> list[Any]:
    """Returns the initial states as a list: two states of an LSTM, one of a GRU or an RNN."""
    if isinstance(start, list | tuple):
        return list(start)
    return [start]


def _keep_projected(
    ids: ChannelIds, steps: int, x: Value, weights: Sequence[Value], states: Sequence[Any]
) -> None:
    """Keeps all channels of a layer with `proj_size`, and counts its multiply-adds."""
    for value in values_among((*weights, x, *states)):
        ids.keep_all(value.axes, "a projected state")
    for weight in weights:
        if len(weight.shape) == 2:
            ids.mark_role(weight.axes[0], "write")
            ids.count_multiply_adds(steps, *weight.shape)


@rule("lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default")
def recurrent_cell(
    ids: ChannelIds, shape: Shape, x: Value, start: Any, w_ih: Value, w_hh: Value, *biases: Any
) -> Axes | list[Axes]:
    """One step of a recurrent layer; an LSTM returns two states."""
    hidden = w_hh.axes[1]
    assert hidden is not None, "parameters have ids"
    steps = int(np.prod(x.shape[:-1]))
    _unite_cell(ids, steps, x.axes[-1], hidden, [w_ih, w_hh], values_among(biases))
    states = _states(start)
    for state in states:
        ids.unite(state.axes[-1], hidden)
    axes = (*x.axes[:-1], hidden)
    if len(states) == 1:
        return axes
    # Hidden state and cell state of an LSTM have the same units.
    return [axes, axes]


def _unite_cell(
    ids: ChannelIds,
    steps: int,
    source: Any,
    hidden: Any,
    weights: Sequence[Value],
    biases: Sequence[Value],
) -> None:
    """Unites, for each hidden unit, its row in every gate and the column that reads the unit.

    Args:
        ids: the collector of united and kept ids.
        steps: number of examples times length of the sequence.
        source: ids of the inputs.
        hidden: ids of the hidden units.
        weights: [gates * hidden, inputs] and [gates * hidden, hidden].
        biases: [gates * hidden] each.
    """
    w_ih, w_hh = weights
    gates = w_hh.shape[0] // w_hh.shape[1]
    ids.unite(w_ih.axes[1], source)
    ids.unite(w_hh.axes[1], hidden)
    for weight in weights:
        ids.mark_role(weight.axes[1], "read")
    for weight in weights:
        # The gates are stacked along the rows: unit j is row j of every block.
        ids.unite(weight.axes[0], np.tile(hidden, gates))
        ids.mark_role(weight.axes[0], "write")
        ids.count_multiply_adds(steps, *ids_or_sizes(weight.shape, weight.axes))
    for bias in biases:
        ids.unite(bias.axes[0], np.tile(hidden, gates))
