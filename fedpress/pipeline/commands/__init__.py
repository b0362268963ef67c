"""Commands on models: one stage on one model (`prune`, `federate`, ...), or `measure`."""

from fedpress.pipeline.commands.measuring import measure
from fedpress.pipeline.commands.one_stage import OneStage

__all__ = ["OneStage", "measure"]
