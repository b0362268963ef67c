"""A command is a recipe of one stage: the order is bound here, run like any recipe, and its result read back."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpress import storage
from fedpress.core.examples import Preprocess
from fedpress.data import FederatedData
from fedpress.data.examples import Progress
from fedpress.errors import DataError, FedpressError, ModelError, RecipeError, RunError
from fedpress.models import ModelSpec, memory
from fedpress.models.memory import HELD
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.commands.subject import NOTHING, Outputs, Subject, outputs_of
from fedpress.pipeline.measure import measure
from fedpress.pipeline.recipe import Override, Recipe
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.table import commands
from fedpress.workspace.folder import CURES, RunFolder, list_json, read_json
from fedpress.workspace.state import Event, StageFinished, StageStarted, Tick

TOP = ("data", "model", "seed")


@dataclass(frozen=True)
class Order:
    """One stage on one model, bound.

    Attributes:
        kind: of the stage, which is the command's name.
        text: the recipe as TOML.
        recipe: the same, checked.
        spec: of a saved model, else None.
        asks: what the user should say too, empty if nothing.
    """

    kind: str
    text: str
    recipe: Recipe
    spec: ModelSpec | None = None
    asks: str = ""

    @classmethod
    def bind(
        cls,
        kind: str,
        subject: Subject,
        keys: Sequence[Override] = (),
        *,
        source: str | None = None,
        path: Path | None = None,
        input_shape: tuple[int, ...] | None = None,
        held: FederatedData | None = None,
        preprocess: Given | None = None,
    ) -> Order:
        """Puts the recipe together.

        Args:
            kind: of the stage.
            subject: the model.
            keys: of the stage, or of the recipe: `seed=1`, `data.validation=500`, `model.arguments.n=8`.
            source: of the data; by default that of the run that left the model, else none.
            path: of the data.
            input_shape: of one example, for an architecture without data.
            held: data in memory, in the place of a source.
            preprocess: how the model wants its inputs; None: as it says itself, or as the public part has them.

        Raises:
            RecipeError: if a key is unknown or a value is wrong, by the name that it has here.
            ModelError: if the model cannot be built, or its input shape is not known.
        """
        asks, row = "", commands()[kind].load()
        found = subject.data() if source is None and held is None else None
        stage: dict[str, Any] = {"kind": kind}
        seed = 0
        if source is not None:
            # What is given to a command is there to be looked at: all is public, but for the one client's example.
            data: dict[str, Any] = {"source": source, "num_clients": 1, "examples_per_client": 1}
            data |= {"partition": {"kind": "iid"}}
            if subject.spec is not None and subject.spec.mean:
                data |= {"mean": list(subject.spec.mean), "std": list(subject.spec.std)}
            if preprocess is not None:
                data |= preprocess.table()
            elif subject.foreign and not row.learns_from_data and not _given(keys, "data.mean"):
                asks = (
                    f"mean=: '{subject.name}' brings its own weights, and its accuracy is measured on inputs "
                    "standardised by these data; if it was trained on others, give mean=(...) and std=(...) of each "
                    'channel (images as values from 0 to 1), or mean="none" if it takes them as they are'
                )
        elif found is not None:
            data, seed = found
        elif held is not None:
            kinds = ":int64" if held.public.x.dtype == torch.int64 else ""
            count = held.num_classes if held.labelled else 0
            data = {
                "source": NOTHING,
                "path": f"{'x'.join(map(str, held.example_shape))}:{count}{kinds}",
            }
            if held.preprocess.mean:
                data |= {"mean": list(held.preprocess.mean), "std": list(held.preprocess.std)}
        else:
            data = {"source": NOTHING, "path": _shape(subject, keys, input_shape)}
            stage |= {
                key: value for key, value in row.without_data.items() if not _given(keys, key)
            }
        if path is not None and data["source"] != NOTHING:
            data["path"] = str(path.resolve())
        elif path is not None:
            raise DataError(
                'path=: there is no data= to be found there; name its source, such as data="cifar10"'
            )
        tree = {"name": kind, "seed": seed, "data": data, "model": subject.model, "stage": [stage]}
        overrides = [
            key if key.key.split(".")[0] in TOP else replace(key, key=f"stage.0.{key.key}")
            for key in keys
        ]
        with _spoken(kind, data["source"]):
            recipe = recipes.load(recipes.write(tree), overrides)
            if row.wants_one_of and not any(_given(keys, key) for key in row.wants_one_of):
                wanted = ", ".join(row.wants_one_of)
                raise RecipeError(
                    f"{kind}: say how much should stay: give one of {wanted}, such as "
                    f"{row.wants_one_of[0]}=0.5"
                )
            return cls(
                kind,
                recipes.write(recipes.tree(recipes.write(tree), overrides)),
                recipe,
                subject.spec,
                asks,
            )

    @staticmethod
    def lies_in(kind: str, folder: Path) -> bool:
        """Says whether a folder is that of a run of this command."""
        try:
            stages = tomllib.loads((folder / "recipe.toml").read_text("utf-8")).get("stage", [])
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            return False
        return (folder / "before.json").exists() and [stage.get("kind") for stage in stages] == [
            kind
        ]

    @classmethod
    def of_folder(cls, folder: Path) -> Order:
        """Reads the order that a run folder of a command was made for; see `lies_in`."""
        text = (folder / "recipe.toml").read_text("utf-8")
        recipe = recipes.load(text)
        saved = recipe.model.checkpoint
        return cls(
            recipe.stage[0].kind,
            text,
            recipe,
            storage.load(saved)[0] if saved is not None else None,
        )

    def load_data(self, progress: Progress | None = None) -> FederatedData:
        """Loads the data, and looks whether it is of the model's classes.

        Raises:
            DataError: if it is of others, or cannot be read.
        """
        data, spec = load_data(self.recipe, progress=progress), self.spec
        if spec is None:
            return data
        if self.recipe.data.source == NOTHING:
            names = spec.class_names or data.class_names
            return replace(data, preprocess=Preprocess(spec.mean, spec.std), class_names=names)
        if spec.class_names and spec.class_names != data.class_names:
            odd = sorted(set(spec.class_names) ^ set(data.class_names))[:3]
            what = f"{', '.join(odd)} differ" if odd else "their order differs"
            raise DataError(
                f"{self.kind}: the data '{data.name}' has other classes than the model ({what}); "
                "give the data that the model was trained for"
            )
        return data

    def check(self, data: FederatedData) -> None:
        """Binds the stage without doing its work.

        Raises:
            DataError: if it learns from labels, and there are none.
            FedpressError: what would stop it.
        """
        if (
            len(data.public)
            and not data.labelled
            and (why := self.recipe.stage[0].looks_at_labels())
        ):
            raise DataError(
                f"data=: {self.kind} with {why} looks at labels, and these inputs have no class numbers; give "
                "data=(inputs, labels), or leave that out"
            )
        with _spoken(
            self.kind, self.recipe.data.source, in_memory=self.recipe.model.architecture == HELD
        ):
            check_recipe(self.recipe, data)

    def execute(self, folder: RunFolder, data: FederatedData) -> Iterator[Event]:
        """Measures the model as it is, then does the work; yields what happens."""
        with _spoken(
            self.kind, self.recipe.data.source, in_memory=self.recipe.model.architecture == HELD
        ):
            path = folder.path / "before.json"
            if not path.exists():
                yield StageStarted(0, "model", "before")
                yield Tick(0, 1, "measuring the model as it is")
                before = {
                    "kind": "model",
                    "name": "before",
                    **measure(first_state(self.recipe, data)),
                }
                checkpoint = self.recipe.model.checkpoint
                if (
                    checkpoint is not None and Path(checkpoint).is_file()
                ):  # a packed file has the size of that file
                    before["file_bytes"] = Path(checkpoint).stat().st_size
                list_json(path, before, folder.path)
                yield StageFinished(0, before)
            yield from runs.execute(self.recipe, folder, data)


@dataclass(frozen=True, eq=False)
class Result:
    """What a command gives back.

    Attributes:
        spec: how to build the model; None for a module from memory of which nothing was kept.
        model: the new model.
        before: what the model was worth and what it cost: accuracy, parameters, macs, file_bytes, latency_ms.
        facts: the same after, with what the stage says: what was left as it was, and why.
        folder: the new model's folder, to be given to the next command; None if nothing was kept.
        artifact: the file that export or pack wrote; None if nothing was kept.
        files: what export or pack wrote, by name, where nothing was kept: the bytes of the file (of two for OpenVINO;
            `inputs.json` too where the data are a table).
    """

    spec: ModelSpec | None
    model: nn.Module
    before: Mapping[str, Any]
    facts: Mapping[str, Any]
    folder: Path | None
    artifact: Path | None
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, run: RunFolder, kind: str) -> Result:
        """Reads what a finished command left in `run`."""
        facts = read_json(run.path / "result.json", cure=CURES["result.json"]).get("final")
        if not isinstance(facts, dict) or "name" not in facts:
            raise RunError(
                f"{run.path / 'result.json'}: corrupt (it has no final.name); {CURES['result.json']}"
            )
        stage = run.stage(0, kind, facts["name"])
        spec, model = stage.load()
        memory.remember_spec(model, spec)  # a later measurement says the same size
        artifact = run.path / facts["artifact"] if "artifact" in facts else None
        before = read_json(run.path / "before.json", cure=CURES["before.json"])
        return cls(spec, model, before, facts, stage.path, artifact)


@dataclass(frozen=True)
class Given:
    """The preprocessing that a user gives with a model that was trained elsewhere."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, mean: object, std: object) -> Given | None:
        """Checks `mean=` and `std=`: numbers, "none" or "data"; None if neither is given.

        Raises:
            DataError: if they are something else.
        """
        if mean is None and std is None:
            return None
        if mean in ("none", "data"):
            if std is not None:
                raise DataError(
                    f'std=: with mean="{mean}" there is nothing to divide by; leave std out'
                )
            return cls((0.0,), (1.0,)) if mean == "none" else cls(None, None)
        pair: list[tuple[float, ...]] = []
        for name, values in (("mean", mean), ("std", std)):
            try:
                given: Any = (values,) if isinstance(values, int | float) else values
                row = tuple(float(value) for value in given)
            except (TypeError, ValueError):
                row = ()
            if (
                not row
                or not all(abs(v) < float("inf") for v in row)
                or (name == "std" and min(row) <= 0)
            ):
                raise DataError(
                    f"{name}=: got {values!r}, expected one number for each channel, such as {name}=(0.5, 0.5, 0.5)"
                    + (" and above 0" if name == "std" else ', or mean="none"')
                )
            pair.append(row)
        if len(pair[0]) != len(pair[1]):
            raise DataError(
                f"std=: {len(pair[1])} values for {len(pair[0])} of mean; give as many of each"
            )
        return cls(*pair)

    def table(self) -> dict[str, Any]:
        """Returns the keys of `[data]`."""
        if self.mean is None or self.std is None:
            return {}
        return {"mean": list(self.mean), "std": list(self.std)}

    def preprocess(self) -> Preprocess:
        """Returns the step itself, for data in memory."""
        return Preprocess(self.mean or (), self.std or ())


class _spoken:
    """Says errors as a command knows their places: `recipe.stage[0].keep_parms` is `prune.keep_parms`."""

    def __init__(self, kind: str, source: str, *, in_memory: bool = False) -> None:
        self.kind, self.source, self.in_memory = kind, source, in_memory

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not isinstance(error, FedpressError):
            return
        said = (
            str(error)
            .replace(f"recipe.stage[0] ({self.kind})", self.kind)
            .replace("recipe.stage[0]", self.kind)
        )
        said = (
            said.replace("stage.0.", f"{self.kind}.")
            .replace("recipe.data", "data")
            .replace("recipe.model", "model")
        )
        said = said.replace(
            "needs a path; set path, or --data on the command line", "needs a path; give path=PATH"
        )
        if self.in_memory:  # it has no arguments that could be changed
            said = said.replace(
                "; fit model.arguments to the data", "; give examples as the model takes them"
            )
            said = re.sub(r", for instance with model\.arguments\.num_classes = \d+", "", said)
        if self.source == NOTHING and isinstance(error, DataError):
            said = said.replace(
                "set data.public_share", "give data=SOURCE, all of which counts as public"
            )
        if said != str(error):
            raise type(error)(said) from error


def _given(keys: Sequence[Override], key: str) -> bool:
    return any(override.key == key for override in keys)


def _shape(subject: Subject, keys: Sequence[Override], shape: tuple[int, ...] | None) -> str:
    """Says what an example of a model without data looks like, and the number of classes, as `no_data` takes them."""
    if subject.spec is not None:
        saved = subject.spec
        shape, model = saved.input_shape, saved.build() if not saved.class_names else None
        found = Outputs(len(saved.class_names), saved.input_dtype == "int64")
    else:
        if shape is None:
            raise ModelError(
                f"input_shape=: the shape of an example of '{subject.name}' is not known; "
                "give it, such as input_shape=(3, 32, 32), or data with data=SOURCE"
            )
        model = subject.fresh(keys)
    if model is not None:
        found = outputs_of(model, shape)
    return f"{'x'.join(map(str, shape))}:{found.classes}{':int64' if found.tokens else ''}"
