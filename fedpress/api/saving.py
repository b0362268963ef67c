"""Defines `fedpress.load` and `fedpress.save` for models in a folder or in one packed file.

A saved model consists of a spec (architecture, its arguments and shapes, as JSON) and tensors.
Nothing is pickled. A packed file is one losslessly compressed `.safetensors` file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from fedpress import storage
from fedpress.api.calls import Model, call_scope, model_of
from fedpress.api.modules import building_spec, not_buildable
from fedpress.api.result import Result
from fedpress.errors import ModelError
from fedpress.models import ModelSpec, memory
from fedpress.models.saved import save_model
from fedpress.pipeline.commands import several
from fedpress.pipeline.commands.subject import ChosenModel


def load(path: str | Path, *, allow_code: Collection[str] | str = ()) -> nn.Module:
    """Loads a saved model as a module, in evaluation mode.

    Args:
        path: folder of a model, folder of a run (its last finished stage is taken), or packed file.
        allow_code: functions that may be called to build the model, as `module:function`.

    Raises:
        ModelError: if there is no model, if the model is damaged, or if the model is built by a
            function that `allow_code` does not name.

    >>> import torch, fedpress, tempfile
    >>> path = f"{tempfile.mkdtemp()}/net"
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> fedpress.save(net, path, input_shape=(4,)).name
    'net'
    >>> torch.equal(fedpress.load(path)[0].weight, net[0].weight)
    True
    """
    with call_scope(allow_code):
        spec, model = storage.load(Path(path))
    # Without its spec, the module could not be saved again or measured like the saved model.
    memory.remember_spec(model, spec)
    return model.eval()


def save(
    model: Model,
    path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    input_shape: Sequence[int] | None = None,
    allow_code: Collection[str] | str = (),
) -> Path:
    """Writes a model to a folder or a packed file, which `load` and every command can open.

    Args:
        model: a `Result`, a torch module, the path of a saved model or run, or the name of a
            function that builds the model, as `package.module:function`.
        path: a new folder; or a new file that ends in `.safetensors`, which is packed losslessly.
        checkpoint: file with a state dict for the model that `module:function` builds.
        input_shape: shape of one example, such as (3, 32, 32). It is needed if `model` names a
            function, or is a module that no call of fedpress has returned.
        allow_code: functions that may be called to build the model, as `module:function`.

    Returns:
        The path.

    Raises:
        ModelError: if `path` exists, or fedpress does not know how to build the module again.

    >>> import torch, fedpress, tempfile
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> packed = fedpress.save(net, f"{tempfile.mkdtemp()}/net.safetensors", input_shape=(4,))
    >>> fedpress.load(packed)[0].out_features
    2
    """
    path = Path(path)
    if path.exists():
        raise ModelError(f"'{path}' exists already", place="path", cure="give a new path")
    with call_scope(allow_code):
        spec, module = _described(model, checkpoint, several.one_shape(input_shape))
        if path.suffix == ".safetensors":
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.pack(spec, module, path)
        else:
            save_model(path, spec, module)
    return path


def _described(
    model: Model, checkpoint: str | Path | None, shape: tuple[int, ...] | None
) -> tuple[ModelSpec, nn.Module]:
    """Returns the spec that builds a model, and the model as a module.

    Raises:
        ModelError: if fedpress does not know how to build the model.
    """
    # The sources of a spec, from the most to the least complete: a result, a file, an earlier
    # call on this module, and last the constructor of the module's class.
    if isinstance(model, Result) and model.spec is not None:
        return model.spec, model.model
    given = model_of(model)[0]
    if not isinstance(given, nn.Module):
        weights = Path(checkpoint) if checkpoint is not None else None
        return ChosenModel.find(given, weights=weights).opened(shape)
    # This spec is preferred to the constructor, because it has the shapes after pruning.
    known = building_spec(given)
    if known is not None:
        return known, given
    named = memory.find_buildable(given)
    if named is None:
        raise not_buildable(given, place="model")
    return (
        ModelSpec(
            architecture=named.architecture,
            arguments=named.arguments,
            input_shape=several.known_shape(type(given).__name__, shape),
        ),
        given,
    )
