"""Codecs: the table of transforms that clip, compress or noise an update before it is sent."""

from collections.abc import Mapping
from typing import Annotated, TypeAlias, get_args

from pydantic import BaseModel, Field

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
from fedpress.codecs.lossless import Lossless
from fedpress.codecs.lowrank import LowRank
from fedpress.codecs.noise import Noise
from fedpress.codecs.powers import Powers
from fedpress.codecs.quantize import Quantize, Sign, Ternary
from fedpress.codecs.rotate import Rotate
from fedpress.codecs.sparse import RandomK, TopK

TransformSettings: TypeAlias = (
    Clip
    | TopK
    | RandomK
    | Rotate
    | LowRank
    | Quantize
    | Powers
    | Sign
    | Ternary
    | Discretize
    | Noise
    | Lossless
)
"""All transforms. To add one, write a file in this folder and list its settings class here."""
# Read from each class, so that a kind is written in one place only.
TRANSFORMS: Mapping[str, type[BaseModel]] = {
    settings.model_fields["kind"].default: settings for settings in get_args(TransformSettings)
}
"""Kind of a transform, such as "clip" -> its settings class."""
AnyTransform = Annotated[TransformSettings, Field(discriminator="kind")]
"""Settings of any transform in a recipe; the key `kind` says of which."""

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
    "Lossless",
    "LowRank",
    "Noise",
    "Powers",
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
