"""Corrects sizes in a module's forward code: `view(n, 4, 8)`, `split([4, 12])`, `x[:, :16]`.

After pruning, sizes that are written into code or stored in attributes are wrong. Such a number is
identified by three things: its module, the place of the call in the code (file, function, line,
column, operation), and its position among the numbers of the call. Example: `view(n, 4, 8)` in
`Block.forward` has the numbers n (position 0), 4 (position 1) and 8 (position 2).

While a module with corrections runs, its calls are intercepted and get the corrected numbers; the
user's code is not changed. If control flow does not reach a place, its corrections are not used. If
a loop reaches a place several times with different numbers, each occurrence has its own correction.
"""

# The three files: `places` names a call, `arguments` reads and replaces its numbers, `corrections`
# has the hooks that do so while a module runs.
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
from fedpress.nn.forward_sizes.corrections import numbers_in, record_numbers_, set_numbers_
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
    "record_numbers_",
    "set_numbers_",
    "with_numbers",
]
