"""The settings of a statistics stage: the keys of its table in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedpress.core.settings import SETTINGS
from fedpress.errors import SettingError
from fedpress.stages.federate.settings import PromiseSettings, SecureSumSettings
from fedpress.workspace.state import Name

BINS = 64
"""Bins between the bounds of a column, from which quantiles are computed."""


class QueryPrivacy(PromiseSettings):
    """`[stage.privacy]` of a statistics stage. The keys mean what they mean in a federate stage."""

    model_config = SETTINGS

    epsilon: float = Field(
        gt=0, description="privacy budget of all sums together; the noise is calibrated to it"
    )


class StatisticsSettings(SecureSumSettings):
    """The keys of a statistics stage."""

    model_config = SETTINGS

    kind: Literal["statistics"]
    name: Name = "statistics"
    bounds: dict[str, tuple[float, float]] = Field(
        {},
        description="lower and upper bound of each column of numbers, such as "
        "{ age = [0, 110] }; values beyond count as the bound. They must be known without the "
        "rows: the smallest and largest private value would tell about rows",
    )
    method: Literal["moments", "quantiles"] = Field(
        "moments",
        description="moments: mean and standard deviation; quantiles: the median, and the distance "
        "of the quartiles / 1.349, on which few extreme values have no effect",
    )
    words: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {},
        description="number of words of a column that keep inputs, such as { job = 20 }: the most "
        "frequent ones of data.words, or of the public rows; others become unknown words",
    )
    privacy: QueryPrivacy = Field(description="the protected unit, who adds the noise, the budget")

    @property
    def bins(self) -> int:
        """Number of bins between the bounds of a column; 0: moments in the place of counts."""
        return BINS if self.method == "quantiles" else 0

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        for name, (low, high) in self.bounds.items():
            if not low < high:
                raise SettingError(
                    f"got [{low:g}, {high:g}], but the lower bound must be below the upper one",
                    place=f"bounds.{name}",
                    cure=f"write [{high:g}, {low:g}]" if low > high else "raise the second number",
                )
        return self
