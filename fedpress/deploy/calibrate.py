"""The ranges that the values of a graph have on calibration batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fedpress.errors import ExportError
from fedpress.grids import InputGrid
from fedpress.ranges import OBSERVERS, Histogram, Observer


class _Watch(fx.Interpreter):
    """Runs the graph and notes the smallest and largest value of every float tensor in it; if asked, all values."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, Histogram] = {}
        self.broken: set[fx.Node] = set()
        self.count = False

    def run_node(self, n: fx.Node) -> Any:
        """Notes what comes out of one operation."""
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            if self.count:
                if n not in self.broken:
                    self.seen[n].add_(value)
                return value
            low, high = (float(v) for v in value.aminmax())
            if not math.isfinite(high - low):
                self.broken.add(n)
            before = self.seen.get(n, Histogram(low, high))
            self.seen[n] = Histogram(min(low, before.low), max(high, before.high))
        return value


def ranges(graph: fx.GraphModule, batches: Sequence[Tensor], observer: Observer) -> dict[fx.Node, tuple[float, float]]:
    """Runs the graph on `batches` and returns the range of every float tensor in it; NaN where it is not finite.

    Raises:
        ExportError: if a batch does not fit or is not finite.
    """
    watch = _Watch(graph)
    wanted = next(n.meta["val"].shape[1:] for n in graph.graph.nodes if n.op == "placeholder")
    for batch in batches:
        if batch.shape[1:] != wanted or not len(batch) or not batch.is_floating_point():
            got = f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
            raise ExportError(
                f"export: a calibration batch is {got}, expected float32 {['n', *wanted]} of at least one example; "
                "give standardised examples with a batch dimension"
            )
    for watch.count in (False,) if observer == "minmax" else (False, True):
        for batch in batches:
            _look(watch, batch)
    grid = InputGrid(bits=8)
    found = {n: OBSERVERS[observer](h, grid) if h.high > h.low else (h.low, h.high) for n, h in watch.seen.items()}
    return found | dict.fromkeys(watch.broken, (math.nan, math.nan))


def _look(watch: _Watch, batch: Tensor) -> None:
    if not bool(batch.isfinite().all()):
        raise ExportError("export: a calibration example holds NaN or infinite values; remove it from the data")
    try:
        watch.run(batch.to("cpu", torch.float32))
    except Exception as error:  # whatever the operations of the model raise
        said, shape = str(error).strip().partition("\n")[0], list(batch.shape)
        raise ExportError(f"export: the model does not take a calibration batch of shape {shape}: {said}") from error
