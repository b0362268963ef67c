"""The type of any stage in the table, as the recipe's settings use it."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from fedpress.stages.table import STAGES

if TYPE_CHECKING:
    from fedpress.stages.base import Stage

    AnyStage = Stage
else:
    AnyStage = reduce(or_, dict.fromkeys(row.load() for row in STAGES))
