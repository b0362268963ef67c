"""Measures the range of values of every tensor in a graph, on calibration batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fedpress.core.inputs import Example
from fedpress.deploy.examples import as_device, by_name
from fedpress.errors import ExportError
from fedpress.nn.observers import OBSERVERS, Histogram, Observer
from fedpress.nn.quant_scheme import InputQuantization


class _RangeRecorder(fx.Interpreter):
    """Runs the graph, and records minimum and maximum of every float tensor.

    In a second pass, with `fills_histograms`, it adds the values to histograms over these ranges.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.histograms: dict[fx.Node, Histogram] = {}
        self.not_finite: set[fx.Node] = set()
        self.fills_histograms = False

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation and records its result."""
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return value

        if self.fills_histograms:
            if n not in self.not_finite:
                self.histograms[n].add_(value)
            return value

        low, high = (float(v) for v in value.aminmax())
        # The difference is checked, because two finite numbers may have an infinite difference.
        if not math.isfinite(high - low):
            self.not_finite.add(n)
        before = self.histograms.get(n, Histogram(low, high))
        self.histograms[n] = Histogram(min(low, before.low), max(high, before.high))
        return value


def ranges(
    graph: fx.GraphModule, batches: Sequence[Example], observer: Observer
) -> dict[fx.Node, tuple[float, float]]:
    """Runs the graph on `batches`, and returns the range (low, high) of every float tensor.

    A tensor that was not finite on some batch has (NaN, NaN).

    Args:
        graph: the captured model.
        batches: standardised examples.
        observer: name of the rule that computes the range; "minmax" takes the least and the largest
            value, other rules use a histogram of the values.

    Raises:
        ExportError: if a batch does not fit or is not finite, or the model fails on it.
    """
    recorder = _RangeRecorder(graph)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    names = [n.name for n in inputs]
    calls = [by_name(as_device(batch), names) for batch in batches]
    # All batches are checked before the first run, which may take long.
    for call in calls:
        _check(call, [n.meta["val"] for n in inputs])

    for call in calls:
        _run(recorder, call)
    # A histogram can count only when its range is known, so all batches run a second time.
    if observer != "minmax":
        recorder.fills_histograms = True
        for call in calls:
            _run(recorder, call)

    grid = InputQuantization(bits=8)
    found: dict[fx.Node, tuple[float, float]] = {}
    for node, histogram in recorder.histograms.items():
        found[node] = histogram.low, histogram.high
        if histogram.high > histogram.low:
            found[node] = OBSERVERS[observer](histogram, grid)
    # The caller must report NaN, because only the caller knows which values are quantized.
    return found | dict.fromkeys(recorder.not_finite, (math.nan, math.nan))


def _check(batch: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raises ExportError unless `batch` holds the tensors that the graph takes."""
    if len(batch) != len(wanted):
        raise ExportError(
            (f"a calibration batch holds {len(batch)} tensors, but the model takes {len(wanted)}"),
            place="batches",
            cure="give batches of the form of the example",
        )
    for got, want in zip(batch, wanted, strict=True):
        same_shape = got.shape[1:] == want.shape[1:]
        same_kind = got.is_floating_point() == want.is_floating_point()
        if same_shape and same_kind and len(got):
            continue
        kind = "standardised examples" if want.is_floating_point() else "examples"
        raise ExportError(
            (
                f"a calibration batch is {_name(got)} {list(got.shape)}, expected "
                f"{_name(want)} {['n', *want.shape[1:]]} of at least one example"
            ),
            place="batches",
            cure=f"give {kind} with a batch dimension",
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _run(recorder: _RangeRecorder, tensors: Sequence[Tensor]) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ExportError(
            "a calibration example holds NaN or infinite values",
            place="batches",
            cure="remove it from the data",
        )
    try:
        recorder.run(*tensors, enable_io_processing=False)
    # The operations of the model may raise anything.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        shape = list(tensors[0].shape)
        raise ExportError(
            f"the model does not take a calibration batch of shape {shape}: {reason}",
            place="batches",
            cure="give batches [n, ...] of the shape that it takes",
        ) from error
