"""A command: a recipe of one stage on one model, and models measured side by side."""

from fedpress.pipeline.commands.measuring import measure
from fedpress.pipeline.commands.one_stage import OneStage

__all__ = ["OneStage", "measure"]
