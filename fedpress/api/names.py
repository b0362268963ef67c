"""The public names of `import fedpress`, each with the equivalent command.

Example: `fedpress.evaluate` is the command `fedpress eval MODEL`. Tests compare `fedpress.__all__`
and the commands with this table, and `docs/python.md` shows it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One public name.

    Attributes:
        name: name in Python, without the leading `fedpress.`.
        command: the equivalent command, or how the command line shows such an object.
        description: what the function does or the object is, in a few words.
    """

    name: str
    command: str
    description: str


ROWS = (
    Row("run", "fedpress run RECIPE", "runs a recipe to its end"),
    Row("check", "fedpress check RECIPE", "checks a recipe without running it: bytes, epsilon"),
    Row("sweep", "fedpress sweep RECIPE", "runs a recipe for all combinations of some values"),
    Row("report", "fedpress report RUN", "draws the report of a run"),
    Row("recipes", "fedpress recipes", "lists the recipes that come with fedpress"),
    Row("train", "fedpress train MODEL", "trains on public examples"),
    Row("distill", "fedpress distill MODEL", "trains on the outputs of a teacher"),
    Row("prune", "fedpress prune MODEL", "removes whole channels"),
    Row("sparsify", "fedpress sparsify MODEL", "sets single weights to zero"),
    Row("l0", "fedpress l0 MODEL", "learns which weights or channels are needed"),
    Row("quantize", "fedpress quantize MODEL", "rounds weights and layer inputs to few bits"),
    Row("federate", "fedpress federate MODEL", "trains over clients that keep their data"),
    Row("pack", "fedpress pack MODEL", "compresses a model losslessly into one file"),
    Row("export", "fedpress export MODEL", "writes a file for a device and compares it with torch"),
    Row("measure", "fedpress measure MODEL...", "measures size and latency in every runtime"),
    Row("evaluate", "fedpress eval MODEL", "measures accuracy and other metrics on examples"),
    Row("predict", "fedpress predict MODEL INPUTS", "returns the answers of a model to examples"),
    Row(
        "pipeline.drafting.draft",
        "fedpress init --data FILE",
        "drafts a recipe for a table, a folder of images, recordings or texts, arrays or a function",
    ),
    Row(
        "data.describe.describe_file",
        "fedpress data describe FILE",
        "shows types, missing values and words of a table",
    ),
    # Commands take the path of a model, so there is no command that only loads one.
    Row("load", "MODEL of every command", "loads a saved model as a module"),
    Row("save", "fedpress save MODEL PATH", "saves a model as a folder or one file"),
    Row("epsilon", "fedpress privacy epsilon", "the epsilon of a number of noised sums"),
    Row("noise_multiplier", "fedpress privacy noise", "the noise multiplier for a given epsilon"),
    # Names with a dot are not in `fedpress.__all__`: a user imports them from their modules.
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
    Row("reports.watching.serve", "fedpress watch RUN", "shows a run in the browser as it goes on"),
    Row("network.folders.init", "fedpress network init", "keys and folders for a deployment"),
    Row("network.folders.add", "fedpress network add NAME", "the folder of a further client"),
    Row("network.folders.renew", "fedpress network renew", "a new certificate for the server"),
    Row(
        "network.data.write_arrays",
        "fedpress network split RECIPE",
        "one file with examples for each client",
    ),
    Row(
        "network.server.ServerNetwork",
        "fedpress server RECIPE",
        "a run whose clients are on other machines",
    ),
    Row("network.client.serve", "fedpress client", "takes part with the data of this machine"),
    Row("api.approving.approve", "fedpress client approve RECIPE", "an owner's yes to a recipe"),
    Row("network.status.status", "fedpress client status", "what was asked, refused and spent"),
    # Classes: no command makes such an object, so `command` says how the command line shows it.
    Row("Recipe", "RECIPE, a TOML file", "the settings of a run, checked"),
    Row("Run", "RUN, a run folder", "a run: its result, model, records and events"),
    Row("Result", "the run folder of a command", "the result of a call on one model"),
    Row("Predictions", "the CSV of fedpress predict", "answers, probabilities and outputs"),
    Row("FederatedData", "--data SOURCE", "clients with private examples, and the public parts"),
    Row("StageStarted", "a bar that begins", "an event of a run"),
    Row("Tick", "a bar that moves", "an event of a run"),
    Row("StageFinished", "a bar that is full", "an event of a run"),
    Row("FedpressError", "exit code 2", "a mistake, with place, problem and cure"),
)
"""All public names, in the order in which `docs/python.md` lists them."""
