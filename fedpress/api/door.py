"""A table of what users can do: each name of `import fedpress`, and the command for the same.

What Python can do the command line can do too, and the other way round. Tests compare both with
this table, and `docs/python.md` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One thing that can be done.

    Attributes:
        name: in Python, without the leading `fedpress.`.
        shell: the command, or what the same thing is called on the command line.
        words: what it does.
    """

    name: str
    shell: str
    words: str


ROWS = (
    Row("run", "fedpress run RECIPE", "runs a recipe to its end"),
    Row("check", "fedpress check RECIPE", "binds a recipe without training: sizes, bytes, epsilon"),
    Row("sweep", "fedpress sweep RECIPE", "runs a recipe for all combinations of some values"),
    Row("report", "fedpress report RUN", "draws the report of a run"),
    Row("recipes", "fedpress recipes", "lists the recipes that come with fedpress"),
    Row("train", "fedpress train MODEL", "trains on public examples"),
    Row("distill", "fedpress distill MODEL", "trains to answer as a teacher does"),
    Row("prune", "fedpress prune MODEL", "removes whole channels"),
    Row("sparsify", "fedpress sparsify MODEL", "sets single weights to zero"),
    Row("l0", "fedpress l0 MODEL", "learns which weights or channels are needed"),
    Row("quantize", "fedpress quantize MODEL", "gives weights and inputs fewer bits"),
    Row("federate", "fedpress federate MODEL", "trains over clients that keep their data"),
    Row("pack", "fedpress pack MODEL", "writes one small file that gives the same bits back"),
    Row("export", "fedpress export MODEL", "writes the file that a device runs, and runs it back"),
    Row("measure", "fedpress measure MODEL...", "measures what models cost in every runtime"),
    Row("evaluate", "fedpress eval MODEL", "measures a model on examples"),
    Row("predict", "fedpress predict MODEL INPUTS", "says what a model answers to examples"),
    Row("load", "MODEL of every command", "opens a saved model as a module"),
    Row("save", "fedpress save MODEL PATH", "writes a model such that every command opens it"),
    Row("epsilon", "fedpress privacy epsilon", "the epsilon of noised sums"),
    Row("noise_multiplier", "fedpress privacy noise", "the noise that keeps an epsilon"),
    Row(
        "privacy.accounting.compose.spent",
        "fedpress privacy compose FILE",
        "the epsilon of several mechanisms together, or of a run's ledger",
    ),
    Row(
        "privacy.noise.distributed.plan",
        "fedpress privacy skellam",
        "noise that clients make together under secure sums",
    ),
    Row("Recipe", "RECIPE, a TOML file", "the settings of a run, checked"),
    Row("Run", "RUN, a run folder", "a run: its result, model, records and events"),
    Row("Result", "the run folder of a command", "what a call on one model gives back"),
    Row("Predictions", "the CSV of fedpress predict", "answers, probabilities and outputs"),
    Row("FederatedData", "--data SOURCE", "clients with private examples, and the public parts"),
    Row("StageStarted", "a bar that begins", "an event of a run"),
    Row("Tick", "a bar that moves", "an event of a run"),
    Row("StageFinished", "a bar that is full", "an event of a run"),
    Row("FedpressError", "exit code 2", "a mistake, with place, problem and cure"),
)
