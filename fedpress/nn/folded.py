"""Changes the structure of a model for folded batch norms: norms become identities.

Folding puts the scale and shift of a norm into the layer before it, so that the norm is not needed.
The new weights are not computed here (see `fedpress.compress.quantize.fold`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fedpress.errors import ModelError
from fedpress.nn.batch_norm import BatchNorm


@torch.no_grad()
def apply_folds_(model: nn.Module, folded: Mapping[str, str]) -> None:
    """Replaces batch norms by identities, and adds a bias of zeros to layers without a bias.

    The caller sets weights and biases afterwards, from the norms or from a file.

    Args:
        model: changed in place.
        folded: name of each batch norm -> name of the convolution or linear layer before it.

    Raises:
        ModelError: if a name is not in the model, if a norm is neither a batch norm nor an
            identity, or if a layer has no weight.
    """
    for norm, into in folded.items():
        owner, _, key = norm.rpartition(".")
        try:
            parent = model.get_submodule(owner)
            layer = model.get_submodule(into)
            inner = model.get_submodule(norm)
        except AttributeError as error:
            raise ModelError(
                f"the model has no module '{norm}' or '{into}'",
                place="spec.folded",
                cure="load the spec that was saved with this model",
            ) from error

        weight = layer._parameters.get("weight")
        if not isinstance(inner, BatchNorm | nn.Identity) or weight is None:
            raise ModelError(
                f"'{norm}' cannot be folded into '{into}'",
                place="spec.folded",
                cure="load the spec that was saved with this model",
            )

        if layer._parameters.get("bias") is None:
            # A transposed convolution has its outputs on axis 1.
            outputs = getattr(layer, "out_channels", len(weight))
            layer.register_parameter("bias", nn.Parameter(weight.detach().new_zeros(outputs)))
        # Not deleted, because the user's forward still calls it.
        parent._modules[key] = nn.Identity()
