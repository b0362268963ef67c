"""One call for each kind of stage: a model in, the changed model and what it is worth out."""

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


def of_stage(function: Call) -> Call:
    """Gives a call the signature and docstring that `help()` and notebooks show: all settings."""
    kind = function.__name__
    settings = commands()[kind].load()
    common = [
        parameter
        for name, parameter in inspect.signature(call).parameters.items()
        if name not in ("kind", "settings")
    ]
    # Arguments that only this call has, such as `clients` of federate.
    common += [
        parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("model", "settings")
    ]
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
        if name not in ("kind", "name")
    ]
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*common, *own], return_annotation=Result
    )
    lines = [f"    {row.key}: {row.meaning}" for row in recipes.keys(kind) if "." not in row.key]
    function.__doc__ = "\n".join(
        [
            inspect.cleandoc(function.__doc__ or ""),
            "",
            "Settings:",
            *lines,
            "",
            "What all calls take besides, and what is raised: `help(fedpress.api.calls.call)`.",
        ]
    )
    return function


@of_stage
def prune(model: Model, **settings: Any) -> Result:
    """Removes whole channels, so that the network is a smaller plain one.

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> small = fedpress.prune(net, input_shape=(8,), keep_params=0.5)
    >>> small.model[0].out_features
    32
    """
    return call("prune", model, **settings)


@of_stage
def sparsify(model: Model, **settings: Any) -> Result:
    """Sets single weights to zero; the shapes stay.

    >>> import torch, fedpress
    >>> widths = [(8, 64), (64, 64), (64, 2)]
    >>> net = torch.nn.Sequential(*[torch.nn.Linear(*width) for width in widths])
    >>> sparse = fedpress.sparsify(net, input_shape=(8,), density=0.25)  # first and last layer stay
    >>> round((sparse.model[1].weight != 0).float().mean().item(), 2)
    0.25
    """
    return call("sparsify", model, **settings)


@of_stage
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


@of_stage
def quantize(model: Model, **settings: Any) -> Result:
    """Quantizes weights and the inputs of layers; with `epochs`, quantization-aware training.

    >>> import torch, fedpress
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> tiny = fedpress.quantize(net, input_shape=(8,), bits=4)
    >>> tiny.model[0].weight[0].unique().numel() <= 2**4
    True
    """
    return call("quantize", model, **settings)


@of_stage
def train(model: Model, **settings: Any) -> Result:
    """Trains on the data, all of which count as public.

    >>> import torch, fedpress
    >>> x = torch.randn(400, 2)
    >>> y = (x[:, 0] > x[:, 1]).long()
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> fedpress.train(net, data=(x, y), epochs=20, batch_size=32).after["accuracy"] > 0.9
    True
    """
    return call("train", model, **settings)


@of_stage
def distill(model: Model, **settings: Any) -> Result:
    """Trains to answer as a teacher does: `teacher=` a module, or the path of a saved model.

    >>> import torch, fedpress
    >>> large = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> small = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> x, y = torch.randn(200, 4), torch.arange(200) % 2
    >>> fedpress.distill(small, data=(x, y), teacher=large, epochs=1).after["parameters"]
    10
    """
    return call("distill", model, **settings)


@of_stage
def pack(model: Model, **settings: Any) -> Result:
    """Packs the model losslessly into one small file: in `result.files`, or in the folder `out`.

    >>> import torch, fedpress
    >>> packed = fedpress.pack(torch.nn.Sequential(torch.nn.Linear(4, 2)), input_shape=(4,))
    >>> list(packed.files)
    ['model.packed.safetensors']
    """
    return call("pack", model, **settings)


@of_stage
def export(model: Model, **settings: Any) -> Result:
    """Writes the file that a device runs, runs it back here, and compares it with torch.

    >>> import torch, fedpress
    >>> exported = fedpress.export(torch.nn.Sequential(torch.nn.Linear(4, 2)), input_shape=(4,))
    >>> list(exported.files)
    ['model.onnx']
    """
    return call("export", model, **settings)


@of_stage
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
    """Federated training over clients that keep their data; counts the real bytes of messages.

    Args:
        model: as all calls take it.
        clients: name -> its private examples: a pair (inputs, labels), a torch Dataset or a
            DataLoader. In their place `data=` may name a source, such as "digits", with keys of
            `[data]`: `data.num_clients`.
        test: examples to measure on; by default 20% of each client's are put aside.
        public: examples that everybody may see, for settings that need some.
        task: what is learned, such as "binary"; by default as model and labels are.
        classes: names of the classes; by default their numbers.
        settings: of the stage.

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
        if isinstance(model, nn.Module) and settings.get("data") is None:
            raise DataError(
                "there are none, so nobody would train",
                place="clients",
                cure=(
                    'give clients={"north": (inputs, labels), "south": dataset}, or ',
                    Argument("data", "SOURCE"),
                ),
            )
        given = {"test": test, "public": public, "task": task, "classes": classes}
        odd = next((name for name, value in given.items() if value is not None), None)
        if odd is not None:
            raise DataError(
                "it goes with clients, and the data of a source have their own",
                place=odd,
                cure="leave it out, or give clients",
            )
    return call("federate", model, **settings)


def made_call(kind: str) -> Call:
    """Returns the call of a row of the table of stages that has no function above."""

    def function(model: Model, **settings: Any) -> Result:
        return call(kind, model, **settings)

    function.__name__ = function.__qualname__ = kind
    function.__doc__ = commands()[kind].summary
    return of_stage(function)


def __getattr__(name: str) -> Call:
    """Returns the call of a stage that somebody has added to the table."""
    if name in commands():
        return made_call(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
