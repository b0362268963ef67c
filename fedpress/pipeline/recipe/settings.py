"""The settings of a recipe: what its tables may hold, checked where they are made."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from fedpress.data import DataSettings
from fedpress.errors import Argument, SettingError
from fedpress.models.memory import IN_MEMORY
from fedpress.pipeline.recipe.mistakes import check_values, first_mistake
from fedpress.pipeline.recipe.overrides import name_stages_
from fedpress.stages.union import AnyStage
from fedpress.training.device import DeviceName
from fedpress.workspace.state import Name


class ModelSettings(BaseModel):
    """The `[model]` table: a built-in architecture or `package.module:function`, and its arguments.

    Or a saved model as `checkpoint`: a model's folder, a run, a stage of one, or a packed file.
    `weights` are a state dict, safetensors or what torch.save wrote, for an architecture that is
    not to begin with fresh ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str | None = Field(
        None,
        description="resnet18, resnet-small, cnn, mlp, or a function of your own, "
        "package.module:function",
    )
    arguments: dict[str, JsonValue] = Field(
        {}, description="of the architecture, such as { num_classes = 10 }"
    )
    checkpoint: Path | None = Field(
        None,
        description="a saved model in the place of an architecture: its folder, a run, a stage of "
        "one, or a packed file",
    )
    weights: Path | None = Field(
        None,
        description="a state dict (.safetensors or .pt) for the architecture, in the place of "
        "fresh "
        "weights",
    )

    @property
    def trained(self) -> bool:
        """Whether the model comes with weights that somebody has trained."""
        return self.checkpoint is not None or self.weights is not None

    @property
    def takes_arguments(self) -> bool:
        """Whether its arguments can be changed: not for a saved model or a module in memory."""
        return self.checkpoint is None and self.architecture != IN_MEMORY

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSettings:
        if self.architecture is None and self.checkpoint is None:
            raise SettingError(
                "it needs either architecture or checkpoint",
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
        if self.checkpoint is not None and self.weights is not None:
            raise SettingError(
                "a checkpoint has weights of its own",
                place="weights",
                cure="leave weights out, or give an architecture in place of the checkpoint",
            )
        return self


class Recipe(BaseModel):
    """The whole way of a model: data, architecture, and the stages in order.

    >>> import fedpress
    >>> recipe = fedpress.Recipe(
    ...     data={"source": "digits"},
    ...     model={"architecture": "cnn"},
    ...     stage=[{"kind": "train", "epochs": 5}, {"kind": "federate", "num_rounds": 3}],
    ... )
    >>> recipe.stage[1].num_rounds
    3
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **tables: Any) -> None:
        """Checks the tables.

        Raises:
            RecipeError: the first mistake, with its place and a cure.
        """
        tables = copy.deepcopy(tables)
        name_stages_(tables)
        check_values(tables, "recipe")
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise first_mistake(error, tables, Recipe) from error

    name: Name = "recipe"
    description: str = Field("", description="one line for people")
    seed: int = Field(0, ge=0, description="of everything that is drawn by chance")
    device: DeviceName = Field(
        "auto",
        description="where stages train and measure: auto (a CUDA GPU if there is one), cpu, cuda, "
        "cuda:1, mps",
    )
    data: DataSettings = Field(description="which rows there are, and who holds what")
    model: ModelSettings = Field(description="the network that the first stage begins with")
    stage: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(
        min_length=1, description="what is done, in order; kind says what"
    )

    @property
    def private(self) -> bool:
        """Whether a stage promises something about the clients' rows."""
        return any(stage.private for stage in self.stage)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        # Folders, random streams and charges go by the name: equal names would share noise.
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


def schema_tree() -> dict[str, Any]:
    """Returns the JSON schema of recipes, with a meaning for every key.

    What `kind` means in a table is what the table's class says of itself.
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
