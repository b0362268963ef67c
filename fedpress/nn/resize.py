"""Smaller tensors in the place of a layer's own, and size attributes that say what its tensors are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def tensor(model: nn.Module, name: str) -> Tensor:
    """Returns the parameter or buffer of this dotted name.

    Raises:
        AttributeError: if `model` has none.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value: Tensor | None = {**module._buffers, **module._parameters}.get(key)
    if value is None:
        raise AttributeError(name)
    return value


class _ComputedByValue(TorchFunctionMode):
    """While it is active, copies of tensors that were computed are copies of their values: torch refuses these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, but for the copy of a tensor with a history."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            memo = args[1]
            if id(args[0]) not in memo:
                memo[id(args[0])] = args[0].detach().clone()
            return memo[id(args[0])]
        return func(*args, **(kwargs or {}))


Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module) -> Module:
    """Returns a deep copy of `model`, also of one that keeps tensors with a history as plain attributes.

    `torch.nn.utils.weight_norm` and `spectral_norm` keep the weight that they computed last so, and users keep outputs.
    Their values are copied; the history is not.
    """
    with _ComputedByValue():
        return deepcopy(model)


def replace_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in the place of the parameters and buffers of these names, and mends the sizes of their layers.

    A tensor that several modules share stays shared: naming it once is enough. Make the optimizer afterwards.

    Raises:
        AttributeError: if `model` lacks one of the names.
    """
    swaps: dict[int, tuple[Tensor, Tensor]] = {}
    for name, new in tensors.items():
        old = tensor(model, name)
        swaps[id(old)] = (old, new)  # holding the old one keeps its id unique
    before = {module: _shapes(module) for module in model.modules()}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for key, value in table.items():
                if id(value) in swaps:
                    table[key] = swaps[id(value)][1]
    for module, shapes in before.items():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, key) for key in module._flat_weights_names]
        if _shapes(module) != shapes:
            _compute_(module)
            _mend_(module, shapes)
    for module in model.modules():  # nested tensors are for the attention of torch alone
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, NarrowAttention) for m in module.modules()
        ):
            module.use_nested_tensor = False


@torch.no_grad()
def _compute_(module: nn.Module) -> None:
    """Computes anew what the old norms of `torch.nn.utils` keep as an attribute until the next forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            setattr(module, hook.name, hook.compute_weight(module))
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


Shapes = tuple[tuple[int, ...], ...]


def _shapes(module: nn.Module) -> Shapes:
    """The shapes that say how large a layer is, the most telling first."""
    return tuple(tuple(t.shape) for t in _telling(module) if t is not None)


@torch.no_grad()
def _telling(module: nn.Module) -> Iterator[Tensor | None]:
    if isinstance(module, nn.MultiheadAttention):
        yield from (
            module.in_proj_weight,
            module.q_proj_weight,
            module.k_proj_weight,
            module.v_proj_weight,
        )
        yield module.out_proj.weight
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
        yield from (getattr(module, "weight_hh" + suffix), getattr(module, "weight_ih" + suffix))
    elif is_parametrized(module, "weight"):
        yield module.weight  # type: ignore[misc]
    else:  # a norm may have no weight; what torch.nn.utils computes has an original
        originals = (module._parameters.get(f"weight{ending}") for ending in ("", "_v", "_orig"))
        yield next((weight for weight in originals if weight is not None), None)
        yield module._buffers.get("running_mean")


def _mend_(module: nn.Module, before: Shapes) -> None:
    """Sets the sizes that a module remembers from the shapes that its tensors have now; they were `before`."""
    now, was = _shapes(module)[0], before[0]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = now
    elif isinstance(module, nn.PReLU):
        module.num_parameters = now[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = now
    elif isinstance(module, nn.modules.conv._ConvNd):
        set_groups_(
            module, now[0] * module.groups // was[0] if depthwise(module) else module.groups
        )
    elif isinstance(module, nn.GroupNorm):  # the channels of a group stay together
        module.num_groups = max(
            1, module.num_groups * now[0] // was[0]
        )  # one group may lose a part of itself
        module.num_channels = now[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = now
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = now[0]
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        module.hidden_size, module.input_size = now[1], _shapes(module)[1][1]
    elif isinstance(module, nn.MultiheadAttention):
        _narrow_(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a layer's weight; of one that is computed from others, the shape that it will have."""
    return _shapes(module)[0]


def depthwise(module: nn.modules.conv._ConvNd) -> bool:
    """Says whether each group of the convolution has one input channel, so that groups go with channels."""
    return module.groups == module.in_channels > 1


def set_groups_(module: nn.modules.conv._ConvNd, groups: int) -> None:
    """Gives the convolution `groups` groups and the numbers of channels that its weight then has."""
    module.groups = groups
    shape = weight_shape(module)
    sizes = shape[0], shape[1] * groups
    module.out_channels, module.in_channels = sizes[::-1] if module.transposed else sizes


class NarrowAttention(nn.MultiheadAttention):
    """Multi-head attention of which heads are gone: `embed_dim` is more than `num_heads` times `head_dim`.

    It has the parameters of `nn.MultiheadAttention` under the same names, and gives the same outputs.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from `query` to `key` and `value`; the arguments are those of `nn.MultiheadAttention`."""
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = F.dropout(
                torch.softmax(scores if mask is None else scores + mask, -1), dropout
            )
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, *inputs: Tensor) -> list[Tensor]:
        """Projects queries, keys and values to [n, heads, length, width], with the rows that `bias_k`, `bias_v` add."""
        packed = self.in_proj_weight
        kernels = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if packed is None
            else packed.chunk(3)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        rows = [F.linear(x, w, b) for x, w, b in zip(inputs, kernels, biases, strict=True)]
        for i, more in ((1, self.bias_k), (2, self.bias_v)):
            if more is not None:
                rows[i] = torch.cat([rows[i], more.expand(len(rows[i]), 1, -1)], 1)
            if self.add_zero_attn:
                rows[i] = F.pad(rows[i], (0, 0, 0, 1))
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in rows]

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Adds up the masks [n or 1, heads or 1, queries, keys]; true or -inf is where not to look."""
        total = None
        if padding is not None:
            total = _added(padding, q).view(len(q), 1, 1, -1)
        if mask is not None:
            wide = _added(mask, q).view(
                -1 if mask.dim() == 3 else 1,
                self.num_heads if mask.dim() == 3 else 1,
                *mask.shape[-2:],
            )
            total = wide if total is None else total + wide
        more = 0 if total is None else k.shape[-2] - total.shape[-1]
        return F.pad(total, (0, more)) if total is not None and more else total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _narrow_(module: nn.MultiheadAttention) -> None:
    module.__class__ = NarrowAttention
    width, module.embed_dim = module.out_proj.weight.shape[1], module.out_proj.weight.shape[0]
    module.num_heads = width // module.head_dim
    module.out_proj.in_features, module.out_proj.out_features = width, module.embed_dim
    packed = module.in_proj_weight
    if packed is None:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    else:
        module.kdim = module.vdim = packed.shape[1]
    module._qkv_same_embed_dim = (
        False  # keeps nn.TransformerEncoderLayer from a fast path with sizes of its own
    )
