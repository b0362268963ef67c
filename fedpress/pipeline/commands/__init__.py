"""One Python call for each kind of stage on one model, and for measuring models: what the command line calls too.

>>> from fedpress.pipeline import commands
>>> small = commands.prune("runs/digits", keep_params=0.5, out="runs/half")       # doctest: +SKIP
>>> tiny = commands.quantize(small.folder, bits=4)                                # doctest: +SKIP
"""

from collections.abc import Callable

from fedpress.pipeline.commands.calls import CALLS
from fedpress.pipeline.commands.measuring import measure
from fedpress.pipeline.commands.order import Order, Result

__all__ = ["CALLS", "Order", "Result", "measure"]


def __getattr__(name: str) -> Callable[..., Result]:
    """Returns the call of a kind of stage, such as `prune`: one for each row of the table of stages."""
    if name in CALLS:
        return CALLS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *CALLS])
