"""Finds the weights of a model that can be made sparse, and says why others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedpress.compress.prune.ignoring import ignored_names
from fedpress.errors import ModelError, RecipeError

LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)
"""Types of layers whose weights can be made sparse."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that can be made sparse: the parameter, and the layout of its axes.

    Attributes:
        name: name of the parameter; a shared parameter has its first name.
        value: the parameter [out, in / groups, ...]; [in, out / groups, ...] if `transposed`.
        groups: number of groups of a grouped convolution, else 1.
        transposed: whether it belongs to a transposed convolution.
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
    """The weights of a model to make sparse, and those that stay dense.

    Attributes:
        chosen: the weights to make sparse, in the model's order.
        dense: name of each parameter with two or more axes that stays dense -> the reason.
    """

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

    Parameters with one number per channel (biases, norms) always stay dense and are not listed. A
    shared weight is listed once.

    Args:
        model: any module.
        keep_first: whether the first of these weights stays dense.
        keep_last: whether the last of these weights stays dense.
        keep: names of parameters, or patterns with `*`, to leave dense.
        ignore: names of modules or parameters, or patterns with `*`, to leave dense.

    Raises:
        RecipeError: if a pattern of `keep` matches no weight, or one of `ignore` nothing.
        ModelError: if all weights stay dense.
    """
    found, dense = _all_weights(model)
    _check_patterns(keep, found, dense)
    names = list(found)
    ignored = ignored_names(model, ignore)

    reasons: dict[str, str] = {}
    for name in names:
        if name in ignored:
            reasons[name] = "asked for by `ignore`"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in keep):
            reasons[name] = "asked for by `keep`"
    # These reasons replace the ones above, because the user may not know these two defaults.
    if keep_first:
        reasons |= dict.fromkeys(names[:1], "the first layer (keep_first)")
    if keep_last:
        reasons |= dict.fromkeys(names[-1:], "the last layer (keep_last)")

    dense |= reasons
    chosen = tuple(w for name, w in found.items() if name not in reasons)
    if not chosen:
        raise ModelError(
            f"no weight of this model may have zeros ({_first_reasons(dense)})",
            place="model",
            cure=(
                "set keep_first = false or keep_last = false, name fewer in keep and ignore, or "
                "use a larger model"
            ),
        )
    return Weights(chosen, dense)


def _check_patterns(
    patterns: Sequence[str], found: Mapping[str, Weight], dense: Mapping[str, str]
) -> None:
    """Raises an error for a pattern that matches no weight: most likely it is misspelt."""
    # A pattern for a weight that stays dense anyway is harmless.
    for pattern in patterns:
        if not _matching([*found, *dense], pattern):
            some = ", ".join(list(found)[:3])
            raise RecipeError(
                f"no weight matches '{pattern}'", place="keep", cure=f"names look like {some}"
            )


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _all_weights(model: nn.Module) -> tuple[dict[str, Weight], dict[str, str]]:
    """Returns two dictionaries by name: the weights that can be sparse, and why others cannot be.

    The others are all other parameters of two or more axes.
    """
    # A shared weight has its first name everywhere.
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Weight] = {}
    dense: dict[str, str] = {}
    for path, module in model.named_modules():
        for key, value in module.named_parameters(recurse=False):
            name = names[id(value)]
            # Biases and norms have one axis.
            if value.dim() < 2 or name in found:
                continue
            # Zeros in the tensors of weight norm or spectral norm are not zeros of the weight.
            if any(key.startswith(f"{weight}_") for weight in _computed_weights(module)):
                dense[name] = "its layer computes the weight from it (weight_norm or spectral_norm)"
            elif isinstance(module, LAYERS) and "weight" in key:
                groups = getattr(module, "groups", 1)
                transposed = bool(getattr(module, "transposed", False))
                found[name] = Weight(name, value, groups, transposed)
            elif ".parametrizations" in f".{path}":
                dense[name] = "its layer computes the weight from it (a parametrization)"
            else:
                kind = type(module).__name__
                dense[name] = f"{kind} is not a convolution, linear, attention or recurrent layer"

    # A tied embedding is also the weight of a linear layer, so it can be made sparse.
    for name in found:
        dense.pop(name, None)
    return found, dense


def _computed_weights(module: nn.Module) -> list[str]:
    """Returns the names of weights computed by `torch.nn.utils.weight_norm` or `spectral_norm`."""
    names = []
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "compute_weight"):
            names.append(str(getattr(hook, "name", "")))
    return names


def _first_reasons(reasons: Mapping[str, str]) -> str:
    some = []
    for name, why in list(reasons.items())[:3]:
        some.append(f"'{name}': {why}")
    return "; ".join(some) or "it has no convolution, linear, attention or recurrent layer"
