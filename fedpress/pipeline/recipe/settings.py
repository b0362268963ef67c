"""The settings of a recipe: what its tables may hold, and what each key of a stage means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from fedpress.data import DataSettings
from fedpress.errors import Argument, SettingError
from fedpress.models.memory import HELD
from fedpress.pipeline.recipe.text import in_one_line, plain
from fedpress.stages.union import AnyStage
from fedpress.training.device import DeviceName
from fedpress.workspace.state import Name


class ModelSettings(BaseModel):
    """The `[model]` table: a built-in architecture or `package.module:function`, and its arguments.

    Or a saved model as `checkpoint`: a model's folder, a run, a stage of one, or a packed file. `weights` are a state
    dict, safetensors or what torch.save wrote, for an architecture that is not to begin with fresh ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str | None = None
    arguments: dict[str, JsonValue] = {}
    checkpoint: Path | None = None
    weights: Path | None = None

    @property
    def trained(self) -> bool:
        """Whether the model comes with weights that somebody has trained."""
        return self.checkpoint is not None or self.weights is not None

    @property
    def takes_arguments(self) -> bool:
        """Whether it is built from arguments that can be changed: no saved model is, and no module in memory."""
        return self.checkpoint is None and self.architecture != HELD

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
    """The whole way of a model: data, architecture, and the stages in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "recipe"
    description: str = ""
    seed: int = Field(0, ge=0)
    device: DeviceName = Field(
        "auto",
        description="where stages train and measure: auto (a CUDA GPU if there is one), cpu, cuda, cuda:1, mps",
    )
    data: DataSettings
    model: ModelSettings
    stage: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(min_length=1)

    @property
    def private(self) -> bool:
        """Whether a stage promises something about the clients' rows."""
        return any(stage.private for stage in self.stage)

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        # Folders, streams of chance and charges go by the name: two stages that share it would share their noise.
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


def schema() -> str:
    """Returns the JSON schema of recipes."""
    return json.dumps(Recipe.model_json_schema(), indent=1)


def keys(kind: str) -> list[tuple[str, str, str]]:
    """Returns name, default and meaning of every key of a kind of stage."""
    full = Recipe.model_json_schema()
    mapping = full["properties"]["stage"]["items"]["discriminator"]["mapping"]
    rows = []
    for name, about in full["$defs"][mapping[kind].rpartition("/")[2]]["properties"].items():
        if name in ("kind", "name"):
            continue
        default = about.get("default")
        told = "" if default is None else in_one_line(plain(default))
        choices = [x for part in (about, *about.get("anyOf", ())) for x in part.get("enum", ())]
        one_of = f"one of {', '.join(map(str, choices))}" if choices else ""
        rows.append((name, told, "; ".join(filter(None, (about.get("description", ""), one_of)))))
    return rows
