"""The table of stages, with a row for each kind; a class is imported when it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpress.stages.base import Stage


@dataclass(frozen=True)
class Row:
    """One kind of stage.

    Attributes:
        kind: name of the stage in a recipe, on the command line and in Python, such as "prune".
        settings: settings class of the stage as `module:Class`.
        summary: a sentence for `--help` and the docstring of the Python call; empty if the kind has
            no command and no call.
    """

    kind: str
    settings: str
    summary: str = ""

    def load(self) -> type[Stage]:
        """Imports the settings class and returns it."""
        module, _, name = self.settings.partition(":")
        # Imported only now: torch alone takes seconds, and `fedpress --help` needs none of it.
        found: type[Stage] = getattr(import_module(module), name)
        return found


# In the order in which `--help` lists the commands.
STAGES = (
    Row(
        "prune",
        "fedpress.stages.prune.stage:PruneStage",
        "Removes whole channels, for instance keep_params=0.3.",
    ),
    Row(
        "sparsify",
        "fedpress.stages.sparsify.stage:SparsifyStage",
        "Sets weights to zero, for instance density=0.1.",
    ),
    Row(
        "l0",
        "fedpress.stages.l0.stage:L0Stage",
        "Learns which weights or channels are needed, for instance density=0.3 epochs=10.",
    ),
    Row(
        "quantize",
        "fedpress.stages.quantize:QuantizeStage",
        "Gives weights and inputs fewer bits, for instance bits=4.",
    ),
    Row(
        "train",
        "fedpress.stages.train:TrainStage",
        "Trains on the public part, for instance epochs=5.",
    ),
    Row(
        "distill",
        "fedpress.stages.train:TrainStage",
        "Trains with a teacher, for instance teacher=runs/dense epochs=5.",
    ),
    Row(
        "pack",
        "fedpress.stages.pack:PackStage",
        "Writes one small file, from which exactly the same weights can be read.",
    ),
    Row(
        "export",
        "fedpress.stages.export:ExportStage",
        "Writes the file that a device runs, for instance int8=true, and runs it to check it.",
    ),
    Row(
        "federate",
        "fedpress.stages.federate.stage:FederateStage",
        "Trains over clients that keep their data, for instance num_rounds=10.",
    ),
    # No summary: it completes the data of a recipe, for the stages after it.
    Row("statistics", "fedpress.stages.statistics.stage:StatisticsStage"),
    # No summary: `fedpress.measure` is a function of its own, for several models.
    Row("measure", "fedpress.stages.measure:MeasureStage"),
)
"""All kinds of stages. To add one, write a file with its settings class and a row here."""


def commands() -> dict[str, Row]:
    """Returns the rows that have a command and a Python call, by kind."""
    return {row.kind: row for row in STAGES if row.summary}


def row_of(kind: str) -> Row:
    """Returns the row of a kind of stage."""
    return next(row for row in STAGES if row.kind == kind)
