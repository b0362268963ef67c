"""The table of federated algorithms: FedAvg, FedProx, FedAvgM, FedAdam, SCAFFOLD, q-FedAvg."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, get_args

from pydantic import BeforeValidator, Field

from fedpress.federation.algorithms.base import Algorithm, AlgorithmRow, RoundInfo, check_fits
from fedpress.federation.algorithms.fedadam import FedAdam
from fedpress.federation.algorithms.fedavg import FedAvg
from fedpress.federation.algorithms.fedavgm import FedAvgM
from fedpress.federation.algorithms.fedprox import FedProx
from fedpress.federation.algorithms.qfedavg import QFedAvg
from fedpress.federation.algorithms.scaffold import Scaffold

Row: TypeAlias = FedAvg | FedProx | FedAvgM | FedAdam | Scaffold | QFedAvg
"""The table. To add an algorithm, write a file in this folder and list its class here."""
ALGORITHMS: Mapping[str, type[AlgorithmRow]] = {
    row.model_fields["kind"].default: row for row in get_args(Row)
}
"""Name in a recipe, such as "fedavg" -> class of the algorithm's settings."""
_Table: TypeAlias = Annotated[Row, Field(discriminator="kind")]


def _named(value: Any) -> Any:
    """Expands a name to a table: "scaffold" becomes {"kind": "scaffold"}."""
    return {"kind": value} if isinstance(value, str) else value


AnyAlgorithm = Annotated[_Table, BeforeValidator(_named, json_schema_input_type=str | _Table)]
"""In a recipe: `algorithm = "scaffold"`, or a table `{ kind = "fedprox", proximal_mu = 0.1 }`."""

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmRow",
    "AnyAlgorithm",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "QFedAvg",
    "RoundInfo",
    "Scaffold",
    "check_fits",
]
