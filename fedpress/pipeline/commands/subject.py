"""Finds the model that a user gives to a command: a path, `module:function` or a module."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import storage, tasks
from fedpress.core import consent
from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import Shape
from fedpress.core.random import STREAMS
from fedpress.data import FederatedData
from fedpress.errors import Argument, DataError, ModelError, Words, did_you_mean
from fedpress.models import ARCHITECTURES, NETWORKS, ModelSpec, memory
from fedpress.models.memory import Buildable
from fedpress.models.weights import load_weights_
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.arguments import errors_of_command
from fedpress.pipeline.commands.several import known_shape
from fedpress.pipeline.places import errors_of_model
from fedpress.pipeline.recipe import Override
from fedpress.pipeline.start import NO_DATA
from fedpress.workspace.atomic import read_json

DATA = ("give ", Argument("data", "SOURCE"))
"""Cure of errors about data that are missing or not named."""
# The name of `no_data` in files of older versions (see `own_modules.MOVED`).
NO_SOURCE = "fedpress.commands.subject:no_data"
"""Source of the placeholder data set, which the function `no_data` below makes."""


@dataclass(frozen=True)
class ChosenModel:
    """The model of a command.

    Attributes:
        model: the `[model]` table of the command's recipe.
        spec: the spec (architecture, input shape, classes and so on) of a saved model; None for a
            function or a module.
        run: folder of the run that wrote the saved model; None if there is no such run.
        module: the module, if the user has given one.
    """

    model: dict[str, Any]
    spec: ModelSpec | None = None
    run: Path | None = None
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """Name of the model for error messages."""
        if self.module is not None:
            return type(self.module).__name__
        return str(self.model.get("architecture", "it"))

    @property
    def foreign(self) -> bool:
        """Whether another program trained the model. Then its mean and std are not known."""
        return self.spec is None and (self.module is not None or "weights" in self.model)

    @classmethod
    def find(cls, model: str | Path, *, weights: Path | None = None) -> ChosenModel:
        """Finds a saved model or an architecture.

        Args:
            model: path of a saved model. If this path does not exist, the name of an architecture,
                such as "cnn" or "package.module:function".
            weights: file with a state dict for the architecture.

        Raises:
            ModelError: if there is no such path or architecture, or the path holds no model.
        """
        path = Path(model)
        if path.exists():
            if weights is not None:
                raise ModelError(
                    f"'{path}' has weights of its own",
                    place="checkpoint",
                    cure="leave one of the two out",
                )
            return cls(
                {"checkpoint": str(path.resolve())}, storage.load(path)[0], _run_of(path.resolve())
            )
        name = str(model)
        if ":" not in name and name not in ARCHITECTURES:
            hint = did_you_mean(name, NETWORKS)
            raise ModelError(
                f"there is no '{name}'{hint}",
                place="model",
                cure=(
                    "give the folder of a model or of a run, a packed file, "
                    f"package.module:function, or one of {', '.join(NETWORKS)}"
                ),
            )
        extra = {"weights": str(Path(weights).resolve())} if weights is not None else {}
        return cls({"architecture": name, **extra})

    def fresh(self, keys: Sequence[Override]) -> nn.Module | None:
        """Builds the architecture with new weights.

        Args:
            keys: settings of the user, such as `model.arguments.num_classes=10`.

        Returns:
            The module; None if the model is a saved one.
        """
        if self.spec is not None:
            return None
        own = [key for key in keys if key.key.startswith("model.")]
        table = recipes.overridden({"model": self.model}, own)["model"]
        spec = ModelSpec(
            architecture=table["architecture"],
            arguments=table.get("arguments", {}),
            # A spec needs some shape, but building the model does not use it.
            input_shape=(1,),
        )
        with errors_of_command("model"), errors_of_model():
            return spec.build_for_user()[1]

    def opened(self, shape: tuple[int, ...] | None = None) -> tuple[ModelSpec, nn.Module]:
        """Opens a saved model, or builds the architecture and loads its weights.

        Args:
            shape: shape of one example; needed if the model is not a saved one.

        Raises:
            ModelError: if the model is damaged, its weights do not fit, or no shape is given.
        """
        if self.spec is not None:
            return storage.load(Path(self.model["checkpoint"]))
        spec = ModelSpec(
            architecture=self.model["architecture"], input_shape=known_shape(self.name, shape)
        )
        spec, module = spec.build_for_user()
        if "weights" in self.model:
            masked = load_weights_(module, Path(self.model["weights"]))
            spec = spec.model_copy(update={"sparse": tuple(dict.fromkeys((*spec.sparse, *masked)))})
        return spec, module

    def data(self) -> tuple[dict[str, Any], int] | None:
        """Returns the `[data]` table and the seed of the run that wrote the model.

        Returns:
            None if no run wrote the model, or that run had no data.

        Raises:
            ModelError: if the run does not name its data, was made with another version of the
                random streams, or its data come from a function that the user has not allowed.
        """
        if self.run is None:
            return None
        settings = read_json(self.run / "settings.json", cure=DATA)
        data, seed = settings.get("data"), settings.get("seed")
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("source"), str)
            or not isinstance(seed, int)
        ):
            raise ModelError(
                "it does not name the data of the run",
                place=f"{self.run / 'settings.json'}",
                cure=DATA,
            )
        table = {key: value for key, value in settings["data"].items() if value is not None}
        if table["source"] == NO_SOURCE:
            return None
        if settings.get("streams", 1) != STREAMS:
            raise ModelError(
                "the run chose its test examples with random streams of another version, so its "
                "test examples cannot be told from its training examples",
                place=f"{self.run / 'settings.json'}",
                cure="give data=SOURCE, best with examples that the model has not seen",
            )
        _check_code(table, self.run / "settings.json")
        # settings.json has no path, since a path may differ between machines. The recipe has one.
        try:
            path = tomllib.loads((self.run / "recipe.toml").read_text("utf-8"))["data"].get("path")
        # If the recipe is damaged, only the path is unknown, and most sources need none.
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
            path = None
        return table | ({"path": path} if path else {}), int(settings["seed"])


def _check_code(table: dict[str, Any], settings: Path) -> None:
    """Checks that the user allows the code which the table `[data]` of a run names.

    The folder may come from a stranger, and a source `module:function` or a task `module:Class` is
    called when the data are loaded.

    Raises:
        ModelError: if the user has not allowed it.
    """
    named = {"source": str(table["source"]), "task": tasks.kind_of(table.get("task") or "")}
    for key in (key for key, name in named.items() if ":" in name):
        try:
            consent.check(named[key], (), f"{settings}: data.{key}")
        except ModelError as error:
            error.add_cure(", or give the data yourself with ", Argument("data", "SOURCE"))
            raise


def _run_of(path: Path) -> Path | None:
    return next(
        # `path` may be the run itself, a stage in `RUN/stages`, or a file in the run.
        (p for p in (path, path.parent.parent, path.parent) if (p / "settings.json").is_file()),
        None,
    )


@contextmanager
def holding(
    module: nn.Module, named: Buildable | None = None, spec: ModelSpec | None = None
) -> Iterator[dict[str, Any]]:
    """Registers a module by a name, so that a recipe, which is text, can refer to it.

    Args:
        module: the user's module.
        named: importable architecture that rebuilds the module in another process, if there is one.
        spec: spec of the module, if it is known.

    Yields:
        The `[model]` table that names the module. The name is valid until the `with` block ends.
    """
    with memory.registered(module, named, spec) as name:
        yield {"architecture": memory.IN_MEMORY, "arguments": {"name": name}}


def no_data(path: Path) -> FederatedData:
    """Returns the placeholder data set of a command without data: one random example.

    Args:
        path: shape of an example and number of classes. `3x32x32:10`: images, 10 classes.
            `3x32x32:0`: the model does not classify. `16:0:int64`: 16 token ids.
            `tokens.int64=16+lengths.int64=:2`: two named inputs, 2 classes.

    Raises:
        DataError: if `path` has another form.

    >>> no_data(Path("3x32x32:10")).describe()["shape"]
    [3, 32, 32]
    """
    try:
        sides, classes, *kind = str(path).split(":")
        count = int(classes)
        if kind not in ([], ["int64"]):
            raise ValueError(kind)
        shape, dtype = _form_of(sides, kind[0] if kind else "float32")
        spec = ModelSpec(architecture="mlp", input_shape=shape, input_dtype=dtype)
        x = spec.example(1, torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError, DataError) as error:
        raise DataError(
            f"got '{path}', expected a shape and a number of classes such as 3x32x32:10",
            place="no data",
        ) from error
    one = Arrays(x, torch.zeros(1, dtype=torch.int64))
    none = Arrays(x[:0], torch.zeros(0, dtype=torch.int64))
    names = tuple(str(i) for i in range(max(1, count)))
    about = Preprocess()
    return FederatedData(
        NO_DATA, {"nobody": one}, none, none, none, len(names), names, about, labelled=count > 0
    )


def form_text(shape: Shape, dtype: str | dict[str, str]) -> str:
    """Writes shape and dtype of an example in the form that `no_data` reads.

    >>> form_text((3, 8), "float32")
    '3x8'
    >>> form_text({"ids": (16,), "n": ()}, {"ids": "int64", "n": "int64"})
    'ids.int64=16+n.int64='
    """
    if isinstance(shape, dict):
        assert isinstance(dtype, dict)
        return "+".join(
            f"{name}.{dtype[name]}={'x'.join(map(str, sizes))}" for name, sizes in shape.items()
        )
    return "x".join(map(str, shape))


def _form_of(text: str, dtype: str) -> tuple[Shape, Any]:
    """Converts the text that `form_text` writes back to shape and dtype.

    For named inputs, both are dictionaries. `dtype` is the dtype of a single input.
    """

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(int(side) for side in text.split("x")) if text else ()

    if "=" not in text:
        return sizes(text), dtype
    named = [part.partition("=") for part in text.split("+")]
    shapes = {name.partition(".")[0]: sizes(shape) for name, _, shape in named}
    return shapes, {name.partition(".")[0]: name.partition(".")[2] for name, _, _ in named}


@dataclass(frozen=True)
class Outputs:
    """What is known about a model after it has run on two examples.

    Attributes:
        classes: number of classes; 0 if the model does not classify.
        tokens: whether the model takes token ids (int64) instead of floats.
    """

    classes: int
    tokens: bool


@torch.no_grad()
def outputs_of(model: nn.Module, shape: tuple[int, ...]) -> Outputs:
    """Runs the model on two random float examples; if it fails on these, on two rows of token ids.

    Raises:
        ModelError: if the model fails on floats and on token ids, or has floating-point parameters
            that are not float32.
    """
    # A float16 model fails on float32 inputs, with an error about layers and not about dtypes.
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        raise ModelError(
            f"it holds {', '.join(map(str, kinds))}, but examples are float32",
            place="model",
            cure="call model.float()",
        )
    model = model.eval()
    tokens = False
    try:
        out = model(torch.randn(2, *shape))
    # A model of token ids refuses floats. Id 0 is in every vocabulary.
    except Exception as error:  # a user's network may raise anything
        try:
            out = model(torch.zeros(2, *shape, dtype=torch.int64))
            tokens = True
        except Exception:
            raise ModelError(
                (
                    f"the model does not take examples of shape {list(shape)} "
                    f"({type(error).__name__}: {str(error).partition(chr(10))[0]})"
                ),
                place="input_shape",
                cure=shape_cure(model, shape),
            ) from error
    # One row of outputs for each example, with at least two classes.
    is_classifier = isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1
    return Outputs(int(out.shape[1]) if is_classifier else 0, tokens)


@torch.no_grad()
def shape_cure(model: nn.Module, shape: tuple[int, ...]) -> Words:
    """Returns what to do about an input shape that the model does not take.

    >>> "".join(map(str, shape_cure(nn.Conv2d(3, 4, 3), (1, 3, 16, 16))))
    'leave out the number of examples: give input_shape=(3, 16, 16)'
    """
    if len(shape) > 1:
        try:
            model.eval()(torch.zeros(2, *shape[1:]))
        # The model also fails without the first number, so the first number is not the mistake.
        except Exception:
            pass
        else:
            return ("leave out the number of examples: give ", Argument("input_shape", shape[1:]))
    return "give the shape of one example, or in Python a list of shapes for several inputs"
