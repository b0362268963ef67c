"""What of a data set is drawn: the columns of its table, and the classes that a client holds.

A report travels, so `shown` returns nothing of private rows unless it is asked to.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fedpress.data.column_facts import Rows
from fedpress.data.dataset import FederatedData

# What fits into a picture.
MOST_COLUMNS = 200
MOST_WORDS = 12
MOST_CLIENTS = 40
MOST_CLASSES = 20


def shown(data: FederatedData, *, rows: Rows, clients: bool) -> dict[str, Any]:
    """Returns what is drawn of a data set, as plain JSON values.

    Args:
        data: the loaded data set, with its columns described.
        rows: "public": columns that were described by private rows are left out.
        clients: whether the classes of each client's private rows are counted.

    Returns:
        "rows": as given. "columns": facts on each column (see `ColumnFacts`), and
        "more_columns": how many are not among them. "classes": names. "labels": number of public
        rows of each class. "clients": for each client the number of rows of each class, and
        "more_clients". What there is nothing of is left out, also if it does not fit a picture.
    """
    found: dict[str, Any] = {"rows": rows, "public": len(data.public)}
    columns = [one for one in data.columns if rows == "all" or one.part == "public"]
    columns = [one for one in columns if one.rows]
    if columns:
        few = [replace(one, words=one.words[:MOST_WORDS]) for one in columns[:MOST_COLUMNS]]
        found["columns"] = [asdict(one) for one in few]
        found["more_columns"] = len(columns) - len(few)
    return found | _classes(data, clients=clients)


def _classes(data: FederatedData, *, clients: bool) -> dict[str, Any]:
    """Returns the classes of the public rows, and of each client if `clients`; see `shown`."""
    labels = data.label_counts(data.public)
    if not (labels and data.labelled and 1 < data.num_classes <= MOST_CLASSES):
        return {}
    found: dict[str, Any] = {"classes": list(data.class_names), "labels": labels}
    # One client alone is compared with nobody; commands without clients make one up.
    if clients and len(data.clients) > 1:
        named = list(data.clients.items())
        found["clients"] = {name: data.label_counts(own) for name, own in named[:MOST_CLIENTS]}
        found["more_clients"] = max(0, len(named) - MOST_CLIENTS)
    return found
