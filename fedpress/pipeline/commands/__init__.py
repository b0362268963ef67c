"""One Python call for each kind of stage on one model, and for measuring models: what the command line calls too.

>>> from fedpress import commands
>>> small = commands.prune("runs/digits", keep_params=0.5, out="runs/half")       # doctest: +SKIP
>>> tiny = commands.quantize(small.folder, bits=4)                                # doctest: +SKIP
"""

from fedpress.pipeline.commands.calls import (
    distill,
    export,
    l0,
    pack,
    prune,
    quantize,
    sparsify,
    train,
)
from fedpress.pipeline.commands.measuring import measure
from fedpress.pipeline.commands.order import Order, Result

__all__ = [
    "Order",
    "Result",
    "distill",
    "export",
    "l0",
    "measure",
    "pack",
    "prune",
    "quantize",
    "sparsify",
    "train",
]
