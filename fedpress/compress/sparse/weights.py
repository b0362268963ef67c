"""Which tensors of a model may get zeros, and why the others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedpress.compress.prune.ignoring import ignored
from fedpress.errors import ModelError, RecipeError

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that may get zeros: the living parameter, and how its layer reads it.

    Attributes:
        name: the first of its names in the model.
        value: [out, in / groups, ...], or [in, out / groups, ...] where `transposed`.
        groups: of a grouped convolution.
        transposed: whether it is that of a transposed convolution.
    """

    name: str
    value: nn.Parameter
    groups: int = 1
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.value.numel()


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights that may get zeros, in the model's order, and the other matrices with the reason they stay dense."""

    chosen: tuple[Weight, ...]
    dense: Mapping[str, str]

    @property
    def size(self) -> int:
        """Number of entries of all chosen weights."""
        return sum(w.size for w in self.chosen)


def find_weights(
    model: nn.Module,
    *,
    keep_first: bool = True,
    keep_last: bool = True,
    keep: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Weights:
    """Finds the weights of convolutions, linear layers, attention and recurrent layers.

    Biases and norms, one number for each channel, always stay and are not listed. A shared weight counts once.

    Args:
        model: any module.
        keep_first: leaves the first of these weights dense.
        keep_last: leaves the last dense.
        keep: names of parameters (patterns with `*`) to leave dense.
        ignore: names of modules or parameters (patterns with `*`) to leave dense.

    Raises:
        RecipeError: if a pattern matches no weight.
        ModelError: if no weight is left.
    """
    found, dense = _all(model)
    _check_patterns(keep, found, dense)
    names = list(found)
    kept = {name for pattern in keep for name in _matching(names, pattern)}
    left = ignored(model, ignore)
    # The first and the last layer come last: of several reasons, theirs is told.
    reasons = {name: "asked for by `keep`" for name in names if name in kept}
    reasons |= {name: "asked for by `ignore`" for name in names if name in left}
    if keep_first:
        reasons |= dict.fromkeys(names[:1], "the first layer (keep_first)")
    if keep_last:
        reasons |= dict.fromkeys(names[-1:], "the last layer (keep_last)")
    dense |= reasons
    chosen = tuple(w for name, w in found.items() if name not in reasons)
    if not chosen:
        raise ModelError(
            f"no weight of this model may get zeros ({_some(dense)})",
            place="model",
            cure=(
                "set keep_first = false or keep_last = false, name less in keep and ignore, or "
                "use a larger model"
            ),
        )
    return Weights(chosen, dense)


def _check_patterns(
    patterns: Sequence[str], found: Mapping[str, Weight], dense: Mapping[str, str]
) -> None:
    """Refuses a pattern that matches no weight, which most likely is misspelt."""
    for pattern in patterns:
        if not _matching([*found, *dense], pattern):
            some = ", ".join(list(found)[:3])
            raise RecipeError(
                f"no weight matches '{pattern}'", place="keep", cure=f"names look like {some}"
            )


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _all(model: nn.Module) -> tuple[dict[str, Weight], dict[str, str]]:
    """Returns all weights by name, and the other parameters of two dimensions or more with a reason."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Weight] = {}
    dense: dict[str, str] = {}
    for path, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            name = names[id(value)]
            if value.dim() < 2 or name in found:
                continue
            if any(key.startswith(f"{weight}_") for weight in _computed(module)):
                dense[name] = "its layer computes the weight from it (weight_norm or spectral_norm)"
            elif isinstance(module, LAYERS) and "weight" in key:
                groups = getattr(module, "groups", 1)
                found[name] = Weight(
                    name, value, groups, bool(getattr(module, "transposed", False))
                )
            elif ".parametrizations" in f".{path}":
                dense[name] = "its layer computes the weight from it (a parametrization)"
            else:
                dense[name] = (
                    f"{type(module).__name__} is no convolution, linear, attention or recurrent layer"
                )
    for name in found:  # a tied embedding: the layer that multiplies by it decides
        dense.pop(name, None)
    return found, dense


def _computed(module: nn.Module) -> list[str]:
    """The weights that hooks of `torch.nn.utils.weight_norm` and `spectral_norm` compute before each forward."""
    return [
        str(getattr(hook, "name", ""))
        for hook in module._forward_pre_hooks.values()
        if hasattr(hook, "compute_weight")
    ]


def _some(reasons: Mapping[str, str]) -> str:
    return (
        "; ".join(f"'{name}': {why}" for name, why in list(reasons.items())[:3])
        or "it has no such layer"
    )
