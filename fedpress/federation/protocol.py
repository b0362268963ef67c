"""The messages of a federated run, one table: every kind, and what each header field may hold.

| kind | from | answered by | what it is for |
| --- | --- | --- | --- |
| `register` | server | `registered` | public facts: a client's count of examples and signing key |
| `agree` | server | `agreed` | each client binds its half and compares every agreed entry |
| `join`, `roster` | server | `join`, `accepted` | keys of a secure sum, once a run |
| `fit` | server | `update` | one client's work in one round, with the server's parameters |
| `unmask` | server | `shares` | what opens one secure sum |
| `evaluate` | server | `evaluated` | metric on a client's own examples; refused under privacy |
| | | `error` | in place of any answer: the client's reason |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedpress.errors import WireError
from fedpress.wire.fields import (
    COUNTS,
    FLAG,
    MAX_SIZE,
    NAMES,
    NUMBER,
    POSITIVE,
    TABLE,
    TEXT,
    FieldKind,
    check_field,
    check_fields,
    whole,
)
from fedpress.wire.message import Message

FIELDS: Mapping[str, Mapping[str, FieldKind]] = {
    "fit": {
        "round": whole(1),
        "agreement": TEXT,
        # Round of the model to which a coded difference refers; 0: to zeros.
        "from": whole(0),
        # Round of the client's last answer that counted; 0 for none.
        "counted": whole(0),
        # In a secure sum: the clients that share masks.
        "cohort": NAMES,
        # With an adaptive clip: its present value, the unit of the update.
        "clip_norm": POSITIVE,
    },
    "update": {
        "round": whole(1),
        "examples": whole(1),
        "loss": NUMBER,
        "steps": whole(0),
        # With an adaptive clip: whether the update was shorter than it.
        "below": FLAG,
        # Counts [not_finite, failed], with noise unless the server adds it.
        "failures": COUNTS,
        "secure": TABLE,
    },
    "evaluate": {"agreement": TEXT},
    "evaluated": {"examples": whole(1), "metrics": TABLE},
    "register": {},
    "registered": {"examples": whole(1), "identity": TEXT},
    "agree": {},
    "agreed": {"agreement": TEXT},
    "join": {"run": TEXT},
    "accepted": {},
    "roster": {"names": NAMES},
    "unmask": {"round": whole(0), "size": whole(0, MAX_SIZE), "cohort": NAMES},
    "shares": {"round": whole(0)},
    "error": {"reason": TEXT},
}
"""FieldKind of message -> field -> what it may hold. Fields that are not in it are ignored."""

REPORT: Mapping[str, FieldKind] = {"round": whole(0)}
"""Fields of the table `secure` in an update."""


def check_header(kind: str, header: Mapping[str, Any]) -> None:
    """Checks every known field that `header` holds; a missing one is left to `need`.

    Raises:
        WireError: naming message, field, what it held and what it must hold.

    >>> check_header("fit", {"round": 3})
    >>> check_header("fit", {"round": True})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedpress.errors.WireError: fit.round: got True, expected a whole number from 1 to ...
    """
    # A field that is not in the table is ignored: a newer version may have added it.
    check_fields(kind, FIELDS.get(kind, {}), header)
    secure = header.get("secure")
    if kind == "update" and isinstance(secure, dict):
        check_fields(f"{kind}.secure", REPORT, secure)


def need(kind: str, header: Mapping[str, Any], name: str) -> Any:
    """Returns the field `name` of a `header`, checked.

    Raises:
        WireError: if it is missing, or holds something else than `FIELDS` says.
    """
    check_field(kind, name, header.get(name), FIELDS[kind][name])
    return header[name]


def text_tensor(text: str) -> Tensor:
    """Returns `text` as uint8 [n] in UTF-8, for what may be longer than a header may be.

    Example: the list of all clients.
    """
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_text(message: Message, name: str) -> str:
    """Returns the text in the tensor `name` of a message, which may come from anybody.

    Raises:
        WireError: if it is missing, or not UTF-8 text.
    """
    tensor = message.tensors.get(name)
    if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise WireError(
            "expected text as uint8 [n]",
            place=f"{message.kind}.{name}",
            cure="use the same fedpress on both sides",
        )
    try:
        return tensor.numpy().tobytes().decode()
    except UnicodeDecodeError as error:
        raise WireError(
            "not UTF-8", place=f"{message.kind}.{name}", cure="send it again"
        ) from error
