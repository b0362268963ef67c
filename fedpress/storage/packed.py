"""A model as one small file: codes in the place of weights, everything entropy-coded, and the same bits back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedpress.core.files import replacing, writing
from fedpress.errors import ModelError, WireError, placing
from fedpress.models import ModelSpec
from fedpress.nn.quantized import quantized_layers, quantized_weights
from fedpress.storage import container
from fedpress.storage.codes import expand_codes, shrink_codes
from fedpress.storage.container import damaged
from fedpress.storage.floats import expand_floats, shrink_floats
from fedpress.storage.table import TYPES, Blob, TensorTable
from fedpress.wire.packing import expand, shrink


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes:
        file_bytes: the size of the file.
        kinds: its bytes by kind: "codes", "scales", "norm" (of normalisation layers), "weights", "rest", "header".
        left: quantized layers whose weights are stored as floats all the same, and why.
    """

    file_bytes: int
    kinds: Mapping[str, int]
    left: Mapping[str, str]


def check_packable(spec: ModelSpec, model: nn.Module) -> None:
    """Looks whether `spec` builds a network with the tensors of `model`.

    Raises:
        ModelError: naming a tensor that differs.
    """
    entries = TensorTable.of(model, {}).entries()
    odd = _differs(spec.build(), entries)
    if odd is not None:
        raise ModelError(
            f"the spec builds another network ('{odd}' differs)",
            place="spec",
            cure="give the spec that belongs to the model",
        )


def pack(spec: ModelSpec, model: nn.Module, path: Path) -> Packed:
    """Writes `model` to the file `path`, in one step, after it was unpacked again and found the same to the bit.

    Raises:
        ModelError: if the model cannot be rebuilt from `spec` and its tensors, or `path` cannot be written.
    """
    check_packable(spec, model)
    data, packed = to_bytes(spec, model)
    own = (spec.architecture,) if ":" in spec.architecture else ()
    back, twin = from_bytes(data, "pack", own)
    ours, theirs = model.state_dict(), twin.state_dict()
    odd = [name for name, value in ours.items() if not _same(value, theirs[name])]
    if odd or back.model_dump() != spec.model_dump():
        raise ModelError(
            f"'{(odd[0] if odd else 'spec')}' would not come back from the file as it is",
            place="spec",
            cure="the spec is of another model, or the model was changed after its spec was made",
        )
    theirs = dict(twin.named_buffers())
    # Those too that are not saved, since forward may read them.
    for name, value in model.named_buffers():
        if name not in theirs or not _same(value, theirs[name]):
            raise ModelError(
                (
                    f"the buffer '{name}' is not saved (persistent=False), and a model built anew "
                    "has another one"
                ),
                place="model",
                cure="make it persistent",
            )
    path = Path(path)
    with writing(path, raises=ModelError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    return packed


def unpack(path: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of a packed file.

    Args:
        path: of the file.
        allow_code: names `module:function` that it may have called; see `fedpress.storage.load`.

    Raises:
        ModelError: if the file is missing, of another version, damaged, or names a function that is not allowed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(
            f"cannot be read ({error.strerror})", place=path, cure="give the path of a packed model"
        ) from error
    return from_bytes(data, str(path), allow_code)


def to_bytes(spec: ModelSpec, model: nn.Module) -> tuple[bytes, Packed]:
    """Returns the bytes of a packed file, and what they are; equal models give equal bytes."""
    codes, left = _codes(model)
    tensors = model.state_dict()
    table = TensorTable.of(model, codes)
    blobs: dict[str, bytes] = {}
    kinds: dict[str, int] = {}
    for name, blob in table.blobs.items():
        kind = name.partition(":")[0]
        if kind == "codes":
            blobs[name] = shrink_codes([codes[n] for n in blob.tensors])
        else:
            blobs[name] = _shrink(
                torch.cat([tensors[n].detach().cpu().reshape(-1) for n in blob.tensors])
            )
        kinds[kind] = kinds.get(kind, 0) + len(blobs[name])
    data = container.to_bytes(
        blobs,
        spec.model_dump_json(exclude_defaults=True),
        table.model_dump_json(exclude_defaults=True),
    )
    return data, Packed(len(data), kinds | {"header": len(data) - sum(kinds.values())}, left)


def from_bytes(
    data: bytes, place: str, allow_code: Collection[str] | str = ()
) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of the bytes that `to_bytes` made; `place` names their file in errors.

    Raises:
        ModelError: if they are of another version, damaged, of a model that cannot be built here, or name a function
            that neither `allow_code` nor the user of this process has allowed.
    """
    blobs, described, listed = container.from_bytes(data, place)
    try:
        with placing(place):
            spec = ModelSpec.of_file(described, allow_code)
        table = TensorTable.model_validate_json(listed)
    except ValidationError as error:
        first = error.errors()[0]
        damaged(
            place,
            f"{'.'.join(map(str, first['loc']))} {first['msg']}, or it is of a newer fedpress",
        )
    if table.blobs.keys() != blobs.keys():
        damaged(place, "its table does not fit what is in it")
    with placing(place):
        model = spec.build_within_limits()
    if (odd := _differs(model, table.entries())) is not None:
        raise ModelError(
            f"its tensors do not fit its spec ('{odd}' differs)",
            place=place,
            cure=(
                f"was the architecture '{spec.architecture}' changed since? Unpack with the one "
                "that was packed"
            ),
        )
    _fill_(model, table, blobs, place)
    return spec, model


def _differs(
    model: nn.Module, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> str | None:
    """The first tensor that is not in both, or has another type or shape; None if there is none."""
    own = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    return min(
        (n for n in own.keys() | entries.keys() if own.get(n) != entries.get(n)), default=None
    )


def _fill_(model: nn.Module, table: TensorTable, blobs: Mapping[str, bytes], place: str) -> None:
    """Puts what lies in `blobs` into `model`, whose tensors have the types and shapes of `table`."""
    tensors: dict[str, Tensor] = {}
    codes: dict[str, Tensor] = {}
    try:
        for name, blob in table.blobs.items():
            if name.startswith("codes:"):
                found = expand_codes(memoryview(blobs[name]), list(blob.tensors.values()), name)
                codes |= dict(zip(blob.tensors, found, strict=True))
            else:
                tensors |= _tensors_in(blob, _expand(blobs[name], blob, name))
    except WireError as error:
        damaged(place, f"{error.place.removeprefix('message.')}: {error.problem}")
    tensors |= {name: tensors[first] for name, first in table.same.items() if first in tensors}
    model.load_state_dict(tensors, strict=False)  # all names were compared
    weights = quantized_weights(model)
    for name, values in codes.items():
        try:
            layer, key = weights[name]
            weight = layer.dequantize(values, key)  # scales and codebooks are in place by now
        except (KeyError, ModelError) as error:
            why = error.problem if isinstance(error, ModelError) else f"there is no {error}"
            damaged(place, f"the codes of '{name}': {why}")
        with torch.no_grad():
            getattr(layer, key).copy_(weight)


def _codes(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The codes of quantized weights by name, and the layers whose weights they cannot stand for, with the reason."""
    codes, left = {}, {}
    for name, layer in quantized_layers(model):
        if layer.scheme.weights is None:
            continue
        for key in layer.keys:
            try:
                found = layer.quantize(key)
            except ModelError as error:
                left[name] = error.told(place="")
                continue
            if _same(layer.dequantize(found, key), getattr(layer, key)):
                codes[f"{name}.{key}"] = found.cpu()
            else:
                left[name] = "its weights are not on their grid; materialize_ moves them there"
    return codes, left


def _shrink(flat: Tensor) -> bytes:
    if flat.is_floating_point():
        return shrink_floats(flat)
    return shrink(flat.view(torch.uint8) if flat.dtype == torch.bool else flat)


def _expand(data: bytes, blob: Blob, place: str) -> Tensor:
    kind, size = TYPES[blob.dtype], sum(map(prod, blob.tensors.values()))
    if kind.is_floating_point:
        return expand_floats(memoryview(data), kind, size, place)
    if kind != torch.bool:
        return expand(memoryview(data), kind, [size], place)
    flat = expand(memoryview(data), torch.uint8, [size], place)
    if size and int(flat.max()) > 1:
        raise WireError(f"got {int(flat.max())}, expected 0 or 1", place=place)
    return flat.view(torch.bool)


def _tensors_in(blob: Blob, flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([prod(shape) for shape in blob.tensors.values()])
    return {
        name: part.reshape(shape)
        for (name, shape), part in zip(blob.tensors.items(), parts, strict=True)
    }


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bits: NaN is itself, minus zero is not zero."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
