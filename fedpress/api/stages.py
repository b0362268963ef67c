"""Functions that do one step of work on a model: `fedpress.prune`, `quantize`, `federate`, ...

A stage is one step of a recipe, such as pruning. There is one function for each kind of stage. It
takes a model and returns a `Result`: the new model, with metrics and costs before and after.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fedpress.api.calls import Model, call
from fedpress.api.result import Result
from fedpress.errors import Argument, DataError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.commands.clients import Clients
from fedpress.stages.table import commands

Call = Callable[..., Result]


def with_stage_signature(function: Call) -> Call:
    """Adds a stage's settings to the signature and docstring of a function, for `help()`.

    The name of the function is the kind of the stage. The function itself takes `**settings`.
    """
    kind = function.__name__
    settings = commands()[kind].load()
    # `kind` is the function's name, and `settings` is replaced by single parameters (`own`).
    # Arguments that only this function has, such as `clients` of federate.
    special = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("model", "settings")
    }
    common = [
        parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if name not in ("kind", "settings", *special)
    ]
    common += special.values()
    own = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty
            if field.is_required()
            else field.get_default(call_default_factory=True),
            annotation=field.annotation,
        )
        for name, field in settings.model_fields.items()  # type: ignore[attr-defined]
        # The name distinguishes the stages of a recipe; a call has only one stage.
        if name not in ("kind", "name")
    ]
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*common, *own], return_annotation=Result
    )
    # A key with a dot, such as `privacy.delta`, belongs to a nested table. The table is a key too,
    # and is listed.
    lines = []
    for row in recipes.keys(kind):
        *tables, name = row.key.split(".")
        if not tables or tables == ["privacy"]:
            lines.append(f"{'    ' * (len(tables) + 1)}{name}: {row.meaning}")
    function.__doc__ = "\n".join(
        [
            inspect.cleandoc(function.__doc__ or ""),
            "",
            "Settings:",
            *lines,
            "",
            "For the other arguments and for errors see `help(fedpress.api.calls.call)`.",
        ]
    )
    return function


@with_stage_signature
def prune(model: Model, **settings: Any) -> Result:
    """Removes whole channels; the result is an ordinary network with smaller layers.

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> small = fedpress.prune(net, input_shape=(8,), keep_params=0.5)
    >>> small.model[0].out_features
    32
    """
    return call("prune", model, **settings)


@with_stage_signature
def sparsify(model: Model, **settings: Any) -> Result:
    """Sets single weights to zero; the shapes of the layers stay.

    >>> import torch, fedpress
    >>> widths = [(8, 64), (64, 64), (64, 2)]
    >>> net = torch.nn.Sequential(*[torch.nn.Linear(*width) for width in widths])
    >>> # The first and the last layer are not changed by default.
    >>> sparse = fedpress.sparsify(net, input_shape=(8,), density=0.25)
    >>> round((sparse.model[1].weight != 0).float().mean().item(), 2)
    0.25
    """
    return call("sparsify", model, **settings)


@with_stage_signature
def l0(model: Model, **settings: Any) -> Result:
    """Learns with L0 gates which weights or channels are needed (Louizos et al. 2018).

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    >>> x = torch.randn(200, 8)
    >>> gated = fedpress.l0(net, data=(x, x.argmax(1)), density=0.5, epochs=2)
    >>> gated.after["nonzero_parameters"] < gated.before["parameters"]
    True
    """
    return call("l0", model, **settings)


@with_stage_signature
def quantize(model: Model, **settings: Any) -> Result:
    """Rounds weights and layer inputs to few bits; `epochs` adds quantization-aware training.

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> tiny = fedpress.quantize(net, input_shape=(8,), bits=4)
    >>> tiny.model[0].weight[0].unique().numel() <= 2**4
    True
    """
    return call("quantize", model, **settings)


@with_stage_signature
def train(model: Model, **settings: Any) -> Result:
    """Trains on the data, without clients. All examples count as public and are not protected.

    >>> import torch, fedpress
    >>> x = torch.randn(400, 2)
    >>> y = (x[:, 0] > x[:, 1]).long()
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> fedpress.train(net, data=(x, y), epochs=20, batch_size=32).after["accuracy"] > 0.9
    True
    """
    return call("train", model, **settings)


@with_stage_signature
def distill(model: Model, **settings: Any) -> Result:
    """Trains a model on the outputs of `teacher`, a module or the path of a saved model.

    >>> import torch, fedpress
    >>> large = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> small = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> x, y = torch.randn(200, 4), torch.arange(200) % 2
    >>> fedpress.distill(small, data=(x, y), teacher=large, epochs=1).after["parameters"]
    10
    """
    return call("distill", model, **settings)


@with_stage_signature
def pack(model: Model, **settings: Any) -> Result:
    """Compresses the model losslessly into one file, in `result.files` or in the folder `out`.

    >>> import torch, fedpress
    >>> packed = fedpress.pack(torch.nn.Sequential(torch.nn.Linear(4, 2)), input_shape=(4,))
    >>> list(packed.files)
    ['model.packed.safetensors']
    """
    return call("pack", model, **settings)


@with_stage_signature
def export(model: Model, **settings: Any) -> Result:
    """Writes a model file for a device, such as ONNX, and compares its outputs with torch.

    The comparison runs the file on this machine.

    >>> import torch, fedpress
    >>> exported = fedpress.export(torch.nn.Sequential(torch.nn.Linear(4, 2)), input_shape=(4,))
    >>> list(exported.files)
    ['model.onnx']
    """
    return call("export", model, **settings)


@with_stage_signature
def federate(
    model: Model,
    *,
    clients: Mapping[str, Any] | None = None,
    test: Any = None,
    public: Any = None,
    task: str | Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> Result:
    """Simulates federated training in this process. Messages are encoded; their bytes are counted.

    Args:
        model: a torch module, a `Result`, the path of a saved model or run, or the name of a
            function that builds the model, as `package.module:function`.
        clients: name -> private examples of that client: a pair (inputs, labels), a torch Dataset
            or a DataLoader. Without `clients`, `data=` may name a source of data such as "digits".
            Settings of the source are then given as `**{"data.num_clients": 5}`.
        test: examples to measure on; None: 20% of each client's examples become the test set.
        public: public examples, for settings that need some.
        task: the task, such as "binary"; None: it is found from the model and the labels.
        classes: names of the classes; None: "0", "1" and so on.
        settings: keys of the stage, such as `num_rounds=5`.

    >>> import torch, fedpress
    >>> x = torch.randn(400, 2)
    >>> y = (x[:, 0] > x[:, 1]).long()
    >>> clients = {"north": (x[:200], y[:200]), "south": (x[200:], y[200:])}
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> together = fedpress.federate(net, clients=clients, num_rounds=5, lr=0.5)
    >>> together.after["accuracy"] > 0.9, together.after["bytes_up"] > 0
    (True, True)
    """
    if clients is not None:
        if settings.get("data") is not None:
            raise DataError("clients are given too", place="data", cure="leave one of them out")
        settings["data"] = Clients(clients, test, public, task, classes)
    else:
        # A saved model may name the data of its run, a module cannot.
        if isinstance(model, nn.Module) and settings.get("data") is None:
            raise DataError(
                "no clients are given",
                place="clients",
                cure=(
                    'give clients={"north": (inputs, labels), "south": dataset}, or ',
                    Argument("data", "SOURCE"),
                ),
            )
        # Without `clients` these arguments would be ignored, and the result would come from other
        # data than the user expects.
        given = {"test": test, "public": public, "task": task, "classes": classes}
        odd = next((name for name, value in given.items() if value is not None), None)
        if odd is not None:
            raise DataError(
                "this argument needs clients=; a source has its own test part, task and classes",
                place=odd,
                cure="leave it out, or give clients",
            )
    return call("federate", model, **settings)


def call_of_added_stage(kind: str) -> Call:
    """Returns a function for a kind of stage that has no function in this file.

    Example: a stage that a user has added to the table of stages.
    """

    def function(model: Model, **settings: Any) -> Result:
        return call(kind, model, **settings)

    function.__name__ = function.__qualname__ = kind
    function.__doc__ = commands()[kind].summary
    return with_stage_signature(function)


def __getattr__(name: str) -> Call:
    """Makes `fedpress.NAME` work for a stage that a user has added to the table of stages."""
    if name in commands():
        return call_of_added_stage(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
