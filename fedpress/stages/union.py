"""The union type of all stages, by which pydantic parses each `[[stage]]` table of a recipe."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

from fedpress.stages.table import STAGES

if TYPE_CHECKING:
    from fedpress.stages.base import Stage

    AnyStage = Stage
else:
    # A type checker cannot evaluate this expression, so it sees the base class.
    AnyStage = reduce(or_, dict.fromkeys(row.load() for row in STAGES))
