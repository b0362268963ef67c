"""The transforms of an update, a table: clip first, then what makes it small, in the order of the recipe."""

from fedpress.federate.transforms.base import (
    VALUES,
    Bound,
    Chain,
    Encoded,
    Key,
    Settings,
    Transform,
    bind_chain,
    decode_chain,
    encode_chain,
)
from fedpress.federate.transforms.clip import Clip

__all__ = [
    "VALUES",
    "Bound",
    "Chain",
    "Clip",
    "Encoded",
    "Key",
    "Settings",
    "Transform",
    "bind_chain",
    "decode_chain",
    "encode_chain",
]
