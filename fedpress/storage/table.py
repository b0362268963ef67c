"""The table of a packed file: which tensors are in which blob, with dtype and shape.

A blob is a byte string with the compressed values of one or several tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from fedpress.core.settings import SETTINGS
from fedpress.errors import ModelError, SettingError
from fedpress.nn.quantized import is_qparam, quantized_weights

# Tensors of at most so many values share a blob with similar tensors (see `TensorTable.of`). Each
# blob has a header and a frequency table, and these may take more bytes than a small tensor.
SMALL = 4096
Type = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
"""Name of a dtype that a packed file can store."""
TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Type)}
"""Name of a dtype -> the dtype."""
Size = Annotated[int, Field(ge=0, lt=1 << 48, strict=True)]
"""Size of one dimension of a tensor; the limit is for damaged files."""


class Blob(BaseModel):
    """Tensors of one dtype, stored one after another: name -> shape."""

    model_config = SETTINGS

    dtype: Type
    tensors: dict[str, tuple[Size, ...]] = Field(min_length=1)


class TensorTable(BaseModel):
    """Where every tensor of a model is stored.

    Attributes:
        blobs: blobs by name. A name is `kind:what:dtype`, such as "weights:conv1.weight:float32".
            `what` depends on the blob. One large tensor: its name. Several small tensors: the last
            part of their names, as in "rest:bias:float32". Integer codes: their quantization, as in
            "codes:int4:float32".
        same: name of a tensor -> name of the earlier tensor with which it shares its memory.
    """

    model_config = SETTINGS

    blobs: dict[str, Blob]
    same: dict[str, str] = {}

    @model_validator(mode="after")
    def _each_once(self) -> TensorTable:
        # The table may come from a damaged file.
        stored: list[str] = []
        for blob in self.blobs.values():
            stored.extend(blob.tensors)
        names = [*stored, *self.same]
        known = set(self.same.values()) <= set(stored)
        if len(set(names)) != len(names) or not known:
            raise SettingError("expected each tensor once, but one is listed twice or not at all")
        return self

    def entries(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of every tensor."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for blob in self.blobs.values():
            for name, shape in blob.tensors.items():
                found[name] = TYPES[blob.dtype], shape
        for name, first in self.same.items():
            found[name] = found[first]
        return found

    @classmethod
    def of(cls, model: nn.Module, codes: Mapping[str, Tensor]) -> TensorTable:
        """Assigns the tensors of `model` to blobs.

        A tensor of more than `SMALL` values gets its own blob. Small tensors share a blob if their
        kinds, their dtypes and the last parts of their names (such as "bias") are equal. Quantized
        weights share a blob if their quantizations and dtypes are equal.

        Args:
            model: the model.
            codes: integer codes of those quantized weights that are not stored as floats, by name.

        Raises:
            ModelError: if a tensor has a dtype that is not in `TYPES`.
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
                    f"'{name}' has the type {kind}, which packed files do not support",
                    place="model",
                    cure=f"convert it to one of {', '.join(TYPES)}",
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
    """Returns the kind of a tensor: values of one kind have similar bits.

    Args:
        leaf: last part of the tensor's name, such as "bias".
        value: the tensor.
        norm: whether the tensor belongs to a normalisation layer.
    """
    if is_qparam(leaf):
        return "scales"
    if norm:
        return "norm"
    return "weights" if value.dim() > 1 else "rest"


def _shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns name -> name of the earlier tensor with the same memory, for shared tensors."""
    first: dict[tuple[Any, ...], str] = {}
    same = {}
    for name, value in tensors.items():
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        # Empty tensors may have the same address although they are not shared.
        if value.numel() and first.setdefault(key, name) != name:
            same[name] = first[key]
    return same
