"""The transforms of an update, a table: clip first, then what makes it small, in the order of the recipe."""

from typing import Annotated

from pydantic import Field

from fedpress.codecs.base import (
    VALUES,
    Bound,
    Chain,
    Encoded,
    Key,
    Settings,
    Transform,
    bind_chain,
    check_float,
    decode_chain,
    encode_chain,
)
from fedpress.codecs.clip import Clip
from fedpress.codecs.discretize import Discretize
from fedpress.codecs.lowrank import LowRank
from fedpress.codecs.noise import Noise
from fedpress.codecs.quantize import Quantize, Sign, Ternary
from fedpress.codecs.rotate import Rotate
from fedpress.codecs.sparse import RandomK, TopK

AnyTransform = Annotated[
    Clip | TopK | RandomK | Rotate | LowRank | Quantize | Sign | Ternary | Discretize | Noise,
    Field(discriminator="kind"),
]
TRANSFORMS = {
    row.model_fields["kind"].default: row
    for row in (Clip, TopK, RandomK, Rotate, LowRank, Quantize, Sign, Ternary, Discretize, Noise)
}

__all__ = [
    "TRANSFORMS",
    "VALUES",
    "AnyTransform",
    "Bound",
    "Chain",
    "Clip",
    "Discretize",
    "Encoded",
    "Key",
    "LowRank",
    "Noise",
    "Quantize",
    "RandomK",
    "Rotate",
    "Settings",
    "Sign",
    "Ternary",
    "TopK",
    "Transform",
    "bind_chain",
    "check_float",
    "decode_chain",
    "encode_chain",
]
