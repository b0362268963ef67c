"""Packs a model losslessly into one small, entropy-coded file, and unpacks it.

The file has a spec (architecture, arguments and shapes, as JSON), from which the network is built,
and the compressed values of its tensors. Quantized weights are stored as small integers (codes).
"""

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
from fedpress.nn.quantized import quantized_layers, quantized_weights, weight_name
from fedpress.storage import container
from fedpress.storage.codes import expand_codes, shrink_codes
from fedpress.storage.container import damaged
from fedpress.storage.floats import expand_floats, shrink_floats
from fedpress.storage.table import TYPES, Blob, TensorTable
from fedpress.wire.packing import expand, shrink


@dataclass(frozen=True)
class Packed:
    """Sizes of a packed file, and the quantized layers that it stores as floats.

    Attributes:
        file_bytes: size of the file in bytes.
        kinds: kind of content -> compressed size in bytes. The kinds are "codes" (quantized
            weights), "scales" (parameters of quantizers), "norm" (normalisation layers), "weights"
            (other tensors of two or more dimensions), "rest" (biases and others), "header".
        float_layers: name of each quantized layer whose weights had to be stored as floats -> the
            reason.
    """

    file_bytes: int
    kinds: Mapping[str, int]
    float_layers: Mapping[str, str]


def check_packable(spec: ModelSpec, model: nn.Module) -> None:
    """Checks that `spec` builds a network with tensors of the same names, types and shapes.

    Raises:
        ModelError: if a tensor differs; the error names the tensor.
    """
    entries = TensorTable.of(model, {}).entries()
    different = _first_difference(spec.build(), entries)
    if different is not None:
        raise ModelError(
            f"the spec builds another network ('{different}' differs)",
            place="spec",
            cure="give the spec that belongs to the model",
        )


def pack(spec: ModelSpec, model: nn.Module, path: Path) -> Packed:
    """Packs `model` into the file `path`. The file is written atomically.

    Before the file is written, the packed bytes are unpacked again, and the result is compared with
    `model` bit by bit.

    Raises:
        ModelError: if the model cannot be rebuilt from `spec` and its tensors, or `path` cannot be
            written.
    """
    check_packable(spec, model)
    data, packed = to_bytes(spec, model)
    _check_round_trip(spec, model, data)
    path = Path(path)
    with writing(path, raises=ModelError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    return packed


def _check_round_trip(spec: ModelSpec, model: nn.Module, data: bytes) -> None:
    """Checks that unpacking the bytes gives the same spec, tensors and buffers.

    Raises:
        ModelError: if something differs; the error names the first tensor or buffer that differs,
            or "spec".
    """
    # An architecture with a colon is a user's function. The user has already called it to build the
    # model, so it may be called again.
    own = (spec.architecture,) if ":" in spec.architecture else ()
    back, twin = from_bytes(data, "pack", own)
    theirs = twin.state_dict()
    different = []
    for name, value in model.state_dict().items():
        if not _same_bits(value, theirs[name]):
            different.append(name)
    if back.model_dump() != spec.model_dump():
        different.append("spec")
    if different:
        raise ModelError(
            f"'{different[0]}' would be different after unpacking the file",
            place="spec",
            cure="give the model's own spec, made after the last change of the model",
        )

    # Forward may also read buffers that are not saved (persistent=False).
    theirs = dict(twin.named_buffers())
    for name, value in model.named_buffers():
        if name not in theirs or not _same_bits(value, theirs[name]):
            raise ModelError(
                (
                    f"the buffer '{name}' is not saved (persistent=False), and a newly built model "
                    "has other values in it"
                ),
                place="model",
                cure="make it persistent",
            )


def unpack(path: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of a packed file.

    Args:
        path: the packed file.
        allow_code: functions, as `module:function`, that the file may name to build its network;
            see `storage.load`.

    Raises:
        ModelError: if the file is missing, has another version, is damaged, or names a function
            that is not allowed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(
            f"cannot be read ({error.strerror})", place=path, cure="give the path of a packed model"
        ) from error
    return from_bytes(data, str(path), allow_code)


def to_bytes(spec: ModelSpec, model: nn.Module) -> tuple[bytes, Packed]:
    """Returns the bytes of a packed file, and their sizes. Equal models give equal bytes.

    Raises:
        ModelError: if a tensor has a type that cannot be packed.
    """
    codes, float_layers = _codes(model)
    tensors = model.state_dict()
    table = TensorTable.of(model, codes)
    blobs: dict[str, bytes] = {}
    kinds: dict[str, int] = {}
    for name, blob in table.blobs.items():
        kind = name.partition(":")[0]
        if kind == "codes":
            blobs[name] = shrink_codes([codes[n] for n in blob.tensors])
        else:
            flat = [tensors[n].detach().cpu().reshape(-1) for n in blob.tensors]
            blobs[name] = _shrink(torch.cat(flat))
        kinds[kind] = kinds.get(kind, 0) + len(blobs[name])
    data = container.to_bytes(
        blobs,
        spec.model_dump_json(exclude_defaults=True),
        table.model_dump_json(exclude_defaults=True),
    )
    kinds["header"] = len(data) - sum(kinds.values())
    return data, Packed(len(data), kinds, float_layers)


def from_bytes(
    data: bytes, place: str, allow_code: Collection[str] | str = ()
) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds a model from the bytes that `to_bytes` made.

    Args:
        data: bytes of the file.
        place: the file's name in errors.
        allow_code: functions that the file may name; see `storage.load`.

    Raises:
        ModelError: if the bytes have another version or are damaged, if the model cannot be built
            here, or if the file names a function that neither `allow_code` nor the user of this
            process has allowed.
    """
    blobs, described, listed = container.from_bytes(data, place)
    try:
        with placing(place):
            spec = ModelSpec.of_file(described, allow_code)
        table = TensorTable.model_validate_json(listed)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        damaged(place, f"{key} {first['msg']}, or a newer fedpress wrote it")
    if table.blobs.keys() != blobs.keys():
        damaged(place, "its table does not fit its content")
    # An untrusted file may describe a network larger than the memory.
    with placing(place):
        model = spec.build_within_limits()
    # Compared before anything is decompressed: a damaged file may declare any size.
    different = _first_difference(model, table.entries())
    if different is not None:
        raise ModelError(
            f"its tensors do not fit its spec ('{different}' differs)",
            place=place,
            cure=(
                f"the code of '{spec.architecture}' may have changed since packing: unpack with "
                "the code of that time"
            ),
        )
    _fill_(model, table, blobs, place)
    return spec, model


def _first_difference(
    model: nn.Module, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> str | None:
    """Returns the alphabetically first name of a tensor whose type or shape differs, or None.

    A tensor that only the model or only `entries` has counts as different.
    """
    own = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    for name in sorted(own.keys() | entries.keys()):
        if own.get(name) != entries.get(name):
            return name
    return None


def _fill_(model: nn.Module, table: TensorTable, blobs: Mapping[str, bytes], place: str) -> None:
    """Decompresses `blobs` into `model`, whose tensors have the types and shapes of `table`."""
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

    for name, first in table.same.items():
        if first in tensors:
            tensors[name] = tensors[first]
    # strict=False, because quantized weights are loaded below. All names were compared before.
    model.load_state_dict(tensors, strict=False)
    # Quantized weights come last, because dequantizing needs the scales and codebooks.
    weights = quantized_weights(model)
    for name, values in codes.items():
        try:
            layer, key = weights[name]
            weight = layer.dequantize(values, key)
        except (KeyError, ModelError) as error:
            why = error.problem if isinstance(error, ModelError) else f"there is no {error}"
            damaged(place, f"the codes of '{name}': {why}")
        with torch.no_grad():
            getattr(layer, key).copy_(weight)


def _codes(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the int8 codes of quantized weights by name, and the layers stored as floats.

    The second result is `Packed.float_layers`: name of the layer -> the reason.
    """
    codes: dict[str, Tensor] = {}
    float_layers: dict[str, str] = {}
    for name, layer in quantized_layers(model):
        if layer.scheme.weights is None:
            continue
        for key in layer.keys:
            try:
                found = layer.quantize(key)
            except ModelError as error:
                float_layers[name] = error.sentence(place="")
                continue
            # Packing must be lossless, so weights that changed after quantization are stored as
            # floats.
            if _same_bits(layer.dequantize(found, key), getattr(layer, key)):
                codes[weight_name(name, key)] = found.cpu()
            else:
                why = "its weights are not quantized values; materialize_ rounds them"
                float_layers[name] = why
    return codes, float_layers


def _shrink(flat: Tensor) -> bytes:
    """Compresses values [n] of any type."""
    # Floats have a coder of their own, which separates exponents from mantissas.
    if flat.is_floating_point():
        return shrink_floats(flat)
    return shrink(flat.view(torch.uint8) if flat.dtype == torch.bool else flat)


def _expand(data: bytes, blob: Blob, place: str) -> Tensor:
    """Decompresses a blob; returns the values of all its tensors, one tensor after another."""
    dtype = TYPES[blob.dtype]
    size = sum(map(prod, blob.tensors.values()))
    if dtype.is_floating_point:
        return expand_floats(memoryview(data), dtype, size, place)
    if dtype != torch.bool:
        return expand(memoryview(data), dtype, [size], place)
    flat = expand(memoryview(data), torch.uint8, [size], place)
    # torch's behaviour is undefined for a bool whose byte is neither 0 nor 1.
    if size and int(flat.max()) > 1:
        raise WireError(f"got {int(flat.max())}, expected 0 or 1", place=place)
    return flat.view(torch.bool)


def _tensors_in(blob: Blob, flat: Tensor) -> dict[str, Tensor]:
    parts = flat.split([prod(shape) for shape in blob.tensors.values()])
    found = {}
    for (name, shape), part in zip(blob.tensors.items(), parts, strict=True):
        found[name] = part.reshape(shape)
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Returns whether dtype, shape and bits are equal: NaN equals NaN, 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(t: Tensor) -> Tensor:
    # As values, NaN would differ from itself and 0.0 would equal -0.0.
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
