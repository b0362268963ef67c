"""How the server makes one vector of what the clients of a round sent: one row per aggregator."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, BeforeValidator, Field

from fedpress.federation.aggregators.mean import Mean
from fedpress.federation.aggregators.median import Median
from fedpress.federation.aggregators.secure import Secure

Row: TypeAlias = Mean | Secure | Median
AGGREGATORS: Mapping[str, type[BaseModel]] = {
    "mean": Mean,
    "secure": Secure,
    "median": Median,
}


def _named(value: Any) -> Any:
    """A name alone is the row of this name with its defaults."""
    return {"kind": value} if isinstance(value, str) else value


AnyAggregator = Annotated[
    Annotated[Row, Field(discriminator="kind")],
    BeforeValidator(
        _named, json_schema_input_type=str | Annotated[Row, Field(discriminator="kind")]
    ),
]
"""What a recipe may say: `aggregator = "median"`, or a table `{ kind = "median" }`."""
