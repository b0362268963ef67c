"""Corrects sizes in a module's forward code: `view(n, 4, 8)`, `split([4, 12])`, `x[:, :16]`.

Sizes that are written into code, or kept in attributes, do not follow tensors that became smaller.
Such a number is identified by its module, by the place of the call in the code (file, function,
line, column, operation), and by its position among the numbers of that call. Example: `view(n, 4,
8)` in `Block.forward` has the numbers n (position 0), 4 (position 1) and 8 (position 2). While a
module with corrections runs, its calls are intercepted and get the correct numbers; code and
weights stay as the user wrote them. Code may take another path each time: places that it does not
reach change nothing. If a loop reaches a place several times with different numbers, each
occurrence has its own.
"""

from fedpress.nn.forward_sizes.arguments import (
    INDEXING,
    SIZED,
    WRITES,
    Number,
    Numbers,
    indices_of,
    numbers_of,
    with_numbers,
)
from fedpress.nn.forward_sizes.corrections import numbers_in, set_numbers_, watch_
from fedpress.nn.forward_sizes.places import CallSite, find_call_site, has_place

__all__ = [
    "INDEXING",
    "SIZED",
    "WRITES",
    "CallSite",
    "Number",
    "Numbers",
    "find_call_site",
    "has_place",
    "indices_of",
    "numbers_in",
    "numbers_of",
    "set_numbers_",
    "watch_",
    "with_numbers",
]
