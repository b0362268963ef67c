"""The table of aggregators: how the server combines the clients' vectors of a round into one."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, Field

from fedpress.federation.aggregators.mean import Mean
from fedpress.federation.aggregators.median import Median
from fedpress.federation.aggregators.secure import Secure
from fedpress.federation.aggregators.trimmed import Trimmed

Row: TypeAlias = Mean | Secure | Median | Trimmed
"""The table. To add an aggregator, write a file in this folder and list its class here."""
AGGREGATORS: Mapping[str, type[BaseModel]] = {
    row.model_fields["kind"].default: row for row in get_args(Row)
}
"""Name in a recipe, such as "mean" -> class of the aggregator's settings."""
_Table: TypeAlias = Annotated[Row, Field(discriminator="kind")]


def _named(value: Any) -> Any:
    """Expands a name to a table: "median" becomes {"kind": "median"}."""
    return {"kind": value} if isinstance(value, str) else value


AnyAggregator = Annotated[_Table, BeforeValidator(_named, json_schema_input_type=str | _Table)]
"""The recipe's value: `aggregator = "median"`, or a table such as `{ kind = "median" }`."""
