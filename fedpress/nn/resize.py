"""Replaces tensors of layers by smaller tensors, and updates sizes such as `Linear.in_features`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """Returns the parameter or buffer with this dotted name, such as "block.0.weight".

    Raises:
        AttributeError: if `model` has no such tensor.
    """
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    value: Tensor | None = {**module._buffers, **module._parameters}.get(key)
    if value is None:
        raise AttributeError(name)
    return value


class _ComputedByValue(TorchFunctionMode):
    """Makes `deepcopy` copy computed tensors by value; by default torch raises an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, except for the copy of a tensor with a gradient history."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            memo = args[1]
            if id(args[0]) not in memo:
                memo[id(args[0])] = args[0].detach().clone()
            return memo[id(args[0])]
        return func(*args, **(kwargs or {}))


Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, instead: Mapping[int, Any] | None = None) -> Module:
    """Returns a deep copy of `model`, even if some of its attributes are computed tensors.

    `torch.nn.utils.weight_norm` and `spectral_norm` store the computed weight in an attribute, and
    user code may store outputs. Such tensors are copied without their gradient history.

    Args:
        model: any module.
        instead: `id` of a tensor of the model -> what the copy has in its place, everywhere.
    """
    with _ComputedByValue():
        return deepcopy(model, dict(instead or {}))


def replace_tensors_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the named parameters and buffers of `model`, and updates the sizes of their layers.

    A tensor that several modules share is replaced in all of them, so one of its names is enough.
    Create the optimizer after this call, because parameters are new objects.

    Raises:
        AttributeError: if `model` has no parameter or buffer with one of the names.
    """
    # Keyed by identity, so that every use of a shared tensor is replaced. The old tensor is kept in
    # the table, because Python may reuse the id of a deleted object.
    swaps: dict[int, tuple[Tensor, Tensor]] = {}
    for name, new in tensors.items():
        old = get_tensor(model, name)
        swaps[id(old)] = (old, new)

    # Shapes are compared afterwards, so that only layers with changed sizes are updated.
    before = {module: _shapes(module) for module in model.modules()}

    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for key, value in table.items():
                if id(value) in swaps:
                    table[key] = swaps[id(value)][1]

    for module, shapes in before.items():
        if isinstance(module, nn.RNNBase):
            # Recurrent layers pass this list to the kernel, not their attributes.
            module._flat_weights = [getattr(module, key) for key in module._flat_weights_names]
        if _shapes(module) != shapes:
            _recompute_(module)
            _set_sizes_(module, shapes)
    for module in model.modules():
        # `NarrowAttention` does not accept nested tensors.
        if isinstance(module, nn.TransformerEncoder) and _has_narrow_attention(module):
            module.use_nested_tensor = False


def _has_narrow_attention(model: nn.Module) -> bool:
    return any(isinstance(module, NarrowAttention) for module in model.modules())


@torch.no_grad()
def _recompute_(module: nn.Module) -> None:
    """Recomputes the weights that hooks of `torch.nn.utils` store as attributes."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            setattr(module, hook.name, hook.compute_weight(module))
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


Shapes = tuple[tuple[int, ...], ...]
"""Shapes of several tensors of a layer, see `_shapes`."""


def _shapes(module: nn.Module) -> Shapes:
    """Returns the shapes of the tensors that determine a layer's sizes, the main weight first."""
    shapes = []
    for tensor in _size_tensors(module):
        if tensor is not None:
            shapes.append(tuple(tensor.shape))
    return tuple(shapes)


@torch.no_grad()
def _size_tensors(module: nn.Module) -> Iterator[Tensor | None]:
    """Yields the tensors that determine the sizes of a layer; None if a layer lacks a tensor."""
    if isinstance(module, nn.MultiheadAttention):
        yield module.in_proj_weight
        yield module.q_proj_weight
        yield module.k_proj_weight
        yield module.v_proj_weight
        yield module.out_proj.weight
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        suffix = "_l0" if isinstance(module, nn.RNNBase) else ""
        yield getattr(module, "weight_hh" + suffix)
        yield getattr(module, "weight_ih" + suffix)
    elif is_parametrized(module, "weight"):
        yield module.weight  # type: ignore[misc]
    else:
        # A weight that hooks of `torch.nn.utils` compute is stored under another name.
        for name in ("weight", "weight_v", "weight_orig"):
            weight = module._parameters.get(name)
            if weight is not None:
                yield weight
                break
        # A batch norm may have no weight.
        yield module._buffers.get("running_mean")


def _set_sizes_(module: nn.Module, before: Shapes) -> None:
    """Updates the size attributes of a module, such as `out_features`, from its new tensors.

    Args:
        module: the module, with new tensors.
        before: the shapes of its old tensors.
    """
    now = _shapes(module)[0]
    old = before[0]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = now
    elif isinstance(module, nn.PReLU):
        module.num_parameters = now[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = now
    elif isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        if is_depthwise(module):
            groups = now[0] * groups // old[0]
        set_groups_(module, groups)
    elif isinstance(module, nn.GroupNorm):
        # Pruning removes whole groups, so their number shrinks with the channels. A single group
        # (a layer norm) is the exception: it may lose some channels, and the division gives 0.
        module.num_groups = max(1, module.num_groups * now[0] // old[0])
        module.num_channels = now[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = now
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = now[0]
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        module.hidden_size = now[1]
        module.input_size = _shapes(module)[1][1]
    elif isinstance(module, nn.MultiheadAttention):
        _narrow_(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, even if the weight is computed from other tensors."""
    return _shapes(module)[0]


def is_depthwise(module: nn.modules.conv._ConvNd) -> bool:
    """Returns whether the convolution is depthwise: each group has one input channel."""
    return module.groups == module.in_channels > 1


def set_groups_(module: nn.modules.conv._ConvNd, groups: int) -> None:
    """Sets the groups of a convolution, and updates its numbers of input and output channels."""
    module.groups = groups
    shape = weight_shape(module)
    # Axis 1 of a weight counts the channels of one group.
    first, second = shape[0], shape[1] * groups
    if module.transposed:
        module.in_channels, module.out_channels = first, second
    else:
        module.out_channels, module.in_channels = first, second


class NarrowAttention(nn.MultiheadAttention):
    """Multi-head attention with pruned heads: `embed_dim` is not `num_heads` times `head_dim`.

    `nn.MultiheadAttention` raises an error for such sizes. Parameters, arguments and outputs are
    the same as those of `nn.MultiheadAttention`.
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
        """Computes attention; arguments and results are those of `nn.MultiheadAttention`."""
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        # The fused kernel does not return attention weights, so they are computed step by step.
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            if mask is not None:
                scores = scores + mask
            weights = F.dropout(torch.softmax(scores, -1), dropout)
            out = weights @ v
            if average_attn_weights:
                weights = weights.mean(1)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, *inputs: Tensor) -> list[Tensor]:
        """Returns queries, keys and values [n, heads, length, width].

        Keys and values get a further row from `bias_k`, `bias_v` and `add_zero_attn`.
        """
        packed = self.in_proj_weight
        weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if packed is not None:
            weights = packed.chunk(3)
        biases: Sequence[Tensor | None] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        rows = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        for i, bias in ((1, self.bias_k), (2, self.bias_v)):
            if bias is not None:
                rows[i] = torch.cat([rows[i], bias.expand(len(rows[i]), 1, -1)], 1)
            if self.add_zero_attn:
                rows[i] = F.pad(rows[i], (0, 0, 0, 1))
        shape = (self.num_heads, self.head_dim)
        return [x.unflatten(-1, shape).transpose(1, 2) for x in rows]

    def _mask(
        self, q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Returns the sum of padding mask and attention mask, to be added to the scores.

        Its shape is [n or 1, heads or 1, queries, keys]. None if there is no mask.
        """
        total = None
        if padding is not None:
            total = _additive(padding, q).view(len(q), 1, 1, -1)
        if mask is not None:
            # A mask of three axes is [n * heads, queries, keys].
            heads = self.num_heads if mask.dim() == 3 else 1
            examples = -1 if mask.dim() == 3 else 1
            wide = _additive(mask, q).view(examples, heads, *mask.shape[-2:])
            total = wide if total is None else total + wide
        if total is None:
            return None
        # The rows that `bias_k` and `add_zero_attn` add are never masked.
        added = k.shape[-2] - total.shape[-1]
        return F.pad(total, (0, added)) if added else total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Returns a mask to add to attention scores; a boolean mask becomes -inf where it is true."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _narrow_(module: nn.MultiheadAttention) -> None:
    """Turns `nn.MultiheadAttention` into a `NarrowAttention` with the sizes of its tensors."""
    module.__class__ = NarrowAttention
    embed_dim, width = module.out_proj.weight.shape
    module.embed_dim = embed_dim
    module.num_heads = width // module.head_dim
    module.out_proj.in_features = width
    module.out_proj.out_features = embed_dim
    packed = module.in_proj_weight
    if packed is None:
        module.kdim = module.k_proj_weight.shape[1]
        module.vdim = module.v_proj_weight.shape[1]
    else:
        module.kdim = packed.shape[1]
        module.vdim = packed.shape[1]
    # Disables the fast path of nn.TransformerEncoderLayer, which assumes the usual sizes.
    module._qkv_same_embed_dim = False
