"""Commands on models: `fedpress prune` and others run one stage, `fedpress measure` compares."""

from fedpress.pipeline.commands.measuring import measure
from fedpress.pipeline.commands.one_stage import OneStage

__all__ = ["OneStage", "measure"]
