"""The keys of `[data]` by which every machine reads its own table, such as the delimiter."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from fedpress.core.settings import SETTINGS


class Reading(BaseModel):
    """How a table is read, beyond what a `Preparation` says of its inputs.

    A server sends it to clients, whose tables look like its own. The keys mean what they mean in
    `[data]` of a recipe (`fedpress.data.settings.DataSettings`).
    """

    model_config = SETTINGS

    delimiter: str = ","
    decimal: Literal[".", ","] = "."
    encoding: str | None = None
    missing: Literal["error", "drop", "mean"] = "error"
    unknown: Literal["drop", "other"] | None = None
    types: dict[str, str] = {}
    client_column: str | None = None
