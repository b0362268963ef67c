"""Numbers in a module's forward code: `view(n, 4, 8)`, `split([4, 12])`, `x[:, :16]`, and how to put others in place.

Sizes that are written into code, or kept in attributes, do not follow tensors that became smaller. Such a number is
identified by its module, by the place of the call in the code (file, function, line, column, operation), and by its
position among the numbers of that call. Example: `view(n, 4, 8)` in `Block.forward` has the numbers n (position 0),
4 (position 1) and 8 (position 2). A module with corrections watches its own calls as it runs and passes the right
numbers; code and weights are as the user made them. Code may take another path each time: places that it does not
reach are left alone. A place that a loop reaches several times with different numbers is counted in addition.
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
from fedpress.nn.forward_sizes.places import Caller, caller, has_place

__all__ = [
    "INDEXING",
    "SIZED",
    "WRITES",
    "Caller",
    "Number",
    "Numbers",
    "caller",
    "has_place",
    "indices_of",
    "numbers_in",
    "numbers_of",
    "set_numbers_",
    "watch_",
    "with_numbers",
]
