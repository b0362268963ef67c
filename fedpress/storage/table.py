"""The table of a packed file: which tensors lie in which blob, of what type and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fedpress.errors import ModelError, SettingError
from fedpress.nn.quantized import is_qparam, quantized_weights

SMALL = 4096  # values: tensors up to this size share a blob with others of their kind
Type = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Type)}
Size = Annotated[int, Field(ge=0, lt=1 << 48, strict=True)]


class Blob(BaseModel):
    """Tensors of one type, one after another: name -> shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Type
    tensors: dict[str, tuple[Size, ...]] = Field(min_length=1)


class TensorTable(BaseModel):
    """Every tensor of a model: in one of the `blobs`, or the `same` as another one, its name -> the other's.

    The name of a blob is `kind:what:type`; the kind "codes" means codes of quantized weights, quantized as `what` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blobs: dict[str, Blob]
    same: dict[str, str] = {}

    @model_validator(mode="after")
    def _each_once(self) -> TensorTable:
        named = [name for blob in self.blobs.values() for name in blob.tensors]
        if len({*named, *self.same}) != len(named) + len(self.same) or not {
            *self.same.values()
        } <= {*named}:
            raise SettingError("a tensor stands twice in it or nowhere, expected each once")
        return self

    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns type and shape of every tensor."""
        found = {
            n: (TYPES[blob.dtype], shape)
            for blob in self.blobs.values()
            for n, shape in blob.tensors.items()
        }
        return found | {name: found[first] for name, first in self.same.items()}

    @classmethod
    def of(cls, model: nn.Module, codes: Mapping[str, Tensor]) -> TensorTable:
        """Lays out the tensors of `model`; those in `codes` by how they are quantized.

        Large ones lie alone, small ones with others of their kind.

        Raises:
            ModelError: if a tensor is of a type that has no name here.
        """
        tensors = model.state_dict()
        same = _shared(tensors)
        norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
        weights = quantized_weights(model)
        blobs: dict[str, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name in same:
                continue
            kind = str(value.dtype).removeprefix("torch.")
            if kind not in TYPES:
                raise ModelError(
                    f"'{name}' is of type {kind}",
                    place="model",
                    cure=f"turn it into one of {', '.join(TYPES)}",
                )
            if name in codes:
                quantization = weights[name][0].weight_quantization()
                blob = f"codes:{quantization.kind}{quantization.bits}:{kind}"
            else:
                owner, _, leaf = name.rpartition(".")
                what = name if value.numel() > SMALL else leaf
                blob = f"{_kind_of(leaf, value, norm=owner in norms)}:{what}:{kind}"
            row = blobs.setdefault(blob, {"dtype": kind, "tensors": {}})
            row["tensors"][name] = tuple(value.shape)
        return cls.model_validate({"blobs": blobs, "same": same})


def _kind_of(leaf: str, value: Tensor, *, norm: bool) -> str:
    """Returns the first word of a blob's name: values of one kind are alike, so they are coded together."""
    if is_qparam(leaf):
        return "scales"
    if norm:
        return "norm"
    return "weights" if value.dim() > 1 else "rest"


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that lie in the memory of an earlier one, with the name of that."""
    first: dict[tuple[Any, ...], str] = {}
    same = {}
    for name, value in tensors.items():
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and first.setdefault(key, name) != name:
            same[name] = first[key]
    return same
