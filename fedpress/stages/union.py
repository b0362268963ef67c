"""The union type of all stages in the table: the recipe's settings read each `[[stage]]` as one."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from fedpress.stages.table import STAGES

if TYPE_CHECKING:
    from fedpress.stages.base import Stage

    AnyStage = Stage
else:
    # Made from the table when it is imported; a type checker sees the base class instead.
    AnyStage = reduce(or_, dict.fromkeys(row.load() for row in STAGES))
