"""The message kinds of a federated run, and the type of each header field.

| kind | from | answered by | purpose |
| --- | --- | --- | --- |
| `offer` | server | `offered`, `refused` | over a network: sends settings and model of a stage |
| `register` | server | `registered` | ask for a client's public facts: examples, signing key |
| `agree` | server | `agreed` | compare the client's settings with the server's |
| `join` | server | `join` | ask for the client's key for secure sums, once a run |
| `roster` | server | `accepted` | send the keys of all clients, once a run |
| `fit` | server | `update` | train for one round from the server's parameters |
| `unmask` | server | `shares` | ask for the key shares that open one secure sum |
| `evaluate` | server | `evaluated` | metric on a client's own examples; refused under privacy |
| | | `error` | replaces any answer if a client fails; it has the reason |
| | | `refused` | replaces any answer that a data owner's policy forbids; has rule and reason |
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
        # With a coded downlink: the round whose model the difference is added to; 0: the tensors
        # contain the full model.
        "from": whole(0),
        # Round of the client's last answer that the server used; 0 for none.
        "counted": whole(0),
        # In a secure sum: the clients of the round, whose masks cancel.
        "cohort": NAMES,
        # With an adaptive clip norm: the current clip norm, by which the client divides its update.
        "clip_norm": POSITIVE,
    },
    "update": {
        "round": whole(1),
        "examples": whole(1),
        "loss": NUMBER,
        "steps": whole(0),
        # With an adaptive clip norm: whether the update's norm was not above it.
        "below": FLAG,
        # Counts [not_finite, failed]. The client adds noise to them, unless the server adds it.
        "failures": COUNTS,
        "secure": TABLE,
    },
    "evaluate": {"agreement": TEXT},
    "evaluated": {"examples": whole(1), "metrics": TABLE},
    # `trial`: before a run the server only asks whether the offer would be accepted.
    "offer": {"stage": TEXT, "trial": FLAG},
    "offered": {"terms": TEXT},
    # A data owner's policy forbids the answer: the rule, and its reason in words.
    "refused": {"rule": TEXT, "reason": TEXT},
    "register": {},
    "registered": {"examples": whole(1), "identity": TEXT},
    # What earlier stages have left of the recipe's epsilon; missing: all of it.
    "agree": {"epsilon": POSITIVE},
    "agreed": {"agreement": TEXT},
    "join": {"run": TEXT},
    "accepted": {},
    "roster": {"names": NAMES},
    "unmask": {"round": whole(0), "size": whole(0, MAX_SIZE), "cohort": NAMES},
    "shares": {"round": whole(0)},
    "error": {"reason": TEXT},
}
"""Kind of message -> field -> its type and limits. Fields that are not listed are ignored."""

MAX_REASON_CHARS = 500
"""The reason in a client's message "error" or "refused" is cut to this length."""

REPORT: Mapping[str, FieldKind] = {"round": whole(0)}
"""Fields of the nested object `secure` in the header of an update."""


def check_header(kind: str, header: Mapping[str, Any]) -> None:
    """Checks every known field in `header`; missing fields are not an error (see `need`).

    Raises:
        WireError: if a field has another type or exceeds a limit; the error names kind, field,
            value and expected type.

    >>> check_header("fit", {"round": 3})
    >>> check_header("fit", {"round": True})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    fedpress.errors.WireError: fit.round: got True, expected a whole number from 1 to ...
    """
    # Unknown fields are ignored, because a newer version may have added them.
    check_fields(kind, FIELDS.get(kind, {}), header)
    secure = header.get("secure")
    if kind == "update" and isinstance(secure, dict):
        check_fields(f"{kind}.secure", REPORT, secure)


def need(kind: str, header: Mapping[str, Any], name: str) -> Any:
    """Returns the field `name` of a header, which must be there and be valid.

    Args:
        kind: kind of the message.
        header: header of the message.
        name: name of the field.

    Raises:
        WireError: if the field is missing, or does not have the type and limits of `FIELDS`.
    """
    check_field(kind, name, header.get(name), FIELDS[kind][name])
    return header[name]


def refusal_of(reply: Message) -> str | None:
    """Returns the reason if `reply` is an error or a refusal; None for any other message.

    Raises:
        WireError: if the reason, or the rule of a refusal, is not a text.

    >>> refusal_of(Message("refused", {"rule": "min_cohort", "reason": "got 2, allowed are 5"}))
    "the owner's policy says no to min_cohort: got 2, allowed are 5"
    """
    if reply.kind not in ("error", "refused"):
        return None
    check_header(reply.kind, reply.header)
    reason = str(reply.header.get("reason", "the client failed and gave no reason"))
    if reply.kind == "refused":
        rule = reply.header.get("rule", "something")
        reason = f"the owner's policy says no to {rule}: {reason}"
    # Cut, because a dishonest client could fill the run's records.
    return reason[:MAX_REASON_CHARS]


def text_tensor(text: str) -> Tensor:
    """Returns `text` as UTF-8 bytes: uint8 [n].

    It is used for texts that may exceed the size limit of a header, such as the agreement.
    """
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_text(message: Message, name: str) -> str:
    """Returns the text in the tensor `name` of an untrusted message (as `text_tensor` makes it).

    Raises:
        WireError: if the tensor is missing, or is not UTF-8 text.
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
