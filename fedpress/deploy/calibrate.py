"""The ranges that the values of a graph have on calibration batches."""

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


def ranges(
    graph: fx.GraphModule, batches: Sequence[Example], observer: Observer
) -> dict[fx.Node, tuple[float, float]]:
    """Runs the graph on `batches` and returns the range of every float tensor in it; NaN where it is not finite.

    Raises:
        ExportError: if a batch does not fit or is not finite.
    """
    watch = _Watch(graph)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    seen = [by_name(as_device(batch), [n.name for n in inputs]) for batch in batches]
    for batch in seen:
        _check(batch, [n.meta["val"] for n in inputs])
    for watch.count in (False,) if observer == "minmax" else (False, True):
        for batch in seen:
            _look(watch, batch)
    grid = InputQuantization(bits=8)
    found = {
        n: OBSERVERS[observer](h, grid) if h.high > h.low else (h.low, h.high)
        for n, h in watch.seen.items()
    }
    return found | dict.fromkeys(watch.broken, (math.nan, math.nan))


def _check(batch: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raises ExportError unless `batch` holds the tensors that the graph takes."""
    if len(batch) != len(wanted):
        raise ExportError(
            (f"a calibration batch holds {len(batch)} tensors, but the model takes {len(wanted)}"),
            place="batches",
            cure="give batches of the form of the example",
        )
    for got, want in zip(batch, wanted, strict=True):
        fits = (
            got.shape[1:] == want.shape[1:] and got.is_floating_point() == want.is_floating_point()
        )
        if not fits or not len(got):
            said = f"{_name(got)} {list(got.shape)}"
            raise ExportError(
                (
                    f"a calibration batch is {said}, expected {_name(want)} "
                    f"{['n', *want.shape[1:]]} of at least one example"
                ),
                place="batches",
                cure=(
                    f"give {'standardised ' * want.is_floating_point()}examples with a batch "
                    "dimension"
                ),
            )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _look(watch: _Watch, tensors: Sequence[Tensor]) -> None:
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ExportError(
            "a calibration example holds NaN or infinite values",
            place="batches",
            cure="remove it from the data",
        )
    try:
        watch.run(*tensors, enable_io_processing=False)
    except Exception as error:  # whatever the operations of the model raise
        said, shape = str(error).strip().partition("\n")[0], list(tensors[0].shape)
        raise ExportError(
            f"the model does not take a calibration batch of shape {shape}: {said}",
            place="batches",
            cure="give batches [n, ...] of the shape that it takes",
        ) from error
