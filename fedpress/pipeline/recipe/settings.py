"""The settings classes of a recipe: the whole recipe, and its table `[model]`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from fedpress.core.settings import SETTINGS
from fedpress.data import DataSettings
from fedpress.errors import Argument, SettingError
from fedpress.models.memory import IN_MEMORY
from fedpress.pipeline.recipe.mistakes import check_values, first_mistake
from fedpress.pipeline.recipe.overrides import name_stages_
from fedpress.stages.union import AnyStage
from fedpress.training.device import DeviceName
from fedpress.workspace.state import Name


class ModelSettings(BaseModel):
    """The table `[model]`: an architecture with new weights or a state dict, or a saved model.

    Give either `architecture` or `checkpoint`. `architecture` may have `arguments`, and `weights`
    (a state dict). A `checkpoint` is a saved model, which contains its architecture.
    """

    model_config = SETTINGS

    architecture: str | None = Field(
        None,
        description="resnet18, resnet-small, cnn, mlp, or a function of your own, "
        "package.module:function",
    )
    arguments: dict[str, JsonValue] = Field(
        {}, description="arguments of the architecture, such as { num_classes = 10 }"
    )
    checkpoint: Path | None = Field(
        None,
        description="a saved model instead of an architecture: its folder, a run, a stage of a "
        "run, or a file that the stage pack or fedpress.save wrote",
    )
    weights: Path | None = Field(
        None,
        description="a state dict (.safetensors or .pt) for the architecture, instead of new "
        "weights",
    )

    @property
    def trained(self) -> bool:
        """Whether the model starts with trained weights, from a checkpoint or a state dict."""
        return self.checkpoint is not None or self.weights is not None

    @property
    def takes_arguments(self) -> bool:
        """Whether `arguments` can be set. A saved model or a module in memory takes none."""
        return self.checkpoint is None and self.architecture != IN_MEMORY

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSettings:
        if self.architecture is None and self.checkpoint is None:
            raise SettingError(
                "neither architecture nor checkpoint is given",
                cure=(
                    "give ",
                    Argument("architecture", "cnn"),
                    " or ",
                    Argument("checkpoint", "PATH"),
                ),
            )
        if self.architecture is not None and self.checkpoint is not None:
            raise SettingError(
                "architecture and checkpoint are both given", cure="leave one of them out"
            )
        # Otherwise it is unclear which of the two the run starts from.
        if self.checkpoint is not None and self.weights is not None:
            raise SettingError(
                "a checkpoint has weights of its own",
                place="weights",
                cure="leave weights out, or give an architecture in place of the checkpoint",
            )
        return self


class Recipe(BaseModel):
    """The settings of a run: the data, the model, and the stages in the order in which they run.

    A stage is one step on the model, such as `train`, `prune`, `federate` or `export`.

    >>> import fedpress
    >>> recipe = fedpress.Recipe(
    ...     data={"source": "digits"},
    ...     model={"architecture": "cnn"},
    ...     stage=[{"kind": "train", "epochs": 5}, {"kind": "federate", "num_rounds": 3}],
    ... )
    >>> recipe.stage[1].num_rounds
    3
    """

    model_config = SETTINGS

    def __init__(self, **tables: Any) -> None:
        """Checks the tables.

        Raises:
            RecipeError: the first mistake, with its place and a cure.
        """
        # A copy, since `name_stages_` adds names to the caller's dictionaries otherwise.
        tables = copy.deepcopy(tables)
        name_stages_(tables)
        # Before pydantic, which accepts inf and nan for a float.
        check_values(tables, "recipe")
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise first_mistake(error, tables, Recipe) from error

    name: Name = "recipe"
    description: str = Field("", description="one line for people")
    # A fixed default and not a random one, so that a run can be repeated.
    seed: int = Field(0, ge=0, description="seed of all random numbers of the run")
    device: DeviceName = Field(
        "auto",
        description="where stages train and measure: auto (a CUDA GPU if there is one), cpu, cuda, "
        "cuda:1, mps",
    )
    data: DataSettings = Field(description="the data, and how they are divided among clients")
    model: ModelSettings = Field(description="the model that the first stage gets")
    stage: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="the stages in order, each of a kind such as train or prune"
    )

    @property
    def private(self) -> bool:
        """Whether at least one stage trains with differential privacy."""
        return any(stage.private for stage in self.stage)

    @property
    def hides_clients(self) -> bool:
        """Whether at least one stage promises that nobody learns what a single client holds."""
        return any(stage.hides_clients for stage in self.stage)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        # Random streams are derived from the stage's name: equal names would share their noise.
        # The privacy ledger uses the name too.
        seen = [stage.name for stage in self.stage]
        twice = next((name for name in seen if seen.count(name) > 1), None)
        if twice is not None:
            second = len(seen) - 1 - seen[::-1].index(twice)
            raise SettingError(
                f"two stages are named '{twice}'",
                place=f"stage[{second}].name",
                cure="give every stage a name of its own",
            )
        return self

    @model_validator(mode="after")
    def _statistics_are_made_once(self) -> Recipe:
        """Checks that data with private statistics have one stage that makes them, the first."""
        makers = [at for at, stage in enumerate(self.stage) if stage.gives_statistics]
        asked = self.data.statistics == "private"
        # A saved model knows the statistics of its training.
        if asked and not makers and self.model.checkpoint is None:
            raise SettingError(
                "no stage makes private statistics",
                place="data.statistics",
                cure='begin with a stage of kind "statistics", or leave this out',
            )
        if makers and not asked:
            raise SettingError(
                "the data take their statistics from public rows",
                place=f"stage[{makers[0]}]",
                cure=("set ", Argument("data.statistics", "private"), ", or leave this stage out"),
            )
        # The stages before would have trained on inputs of another scale.
        if makers and makers != [0]:
            raise SettingError(
                "every stage before it would see other inputs than those after it",
                place=f"stage[{makers[-1]}]",
                cure="make it the first stage, and the only one of its kind",
            )
        return self


def schema_tree() -> dict[str, Any]:
    """Returns the JSON schema of recipes, with a description of every key.

    The key `kind` selects the class of a table. Its description is the first line of the docstring
    of this class.
    """
    full: dict[str, Any] = Recipe.model_json_schema()
    for table in full["$defs"].values():
        kind = table.get("properties", {}).get("kind")
        if kind is not None and "description" not in kind:
            kind["description"] = table.get("description", "").partition("\n")[0]
    return full


def schema() -> str:
    """Returns the JSON schema of recipes as text."""
    return json.dumps(schema_tree(), indent=1)
