"""Writes `inputs.json`: how a device turns a raw row of a table into the network's input."""

from __future__ import annotations

from fedpress.workspace.atomic import write_json_with_checksum
from fedpress.workspace.stage_folder import INPUTS, StageFolder
from fedpress.workspace.state import State


def write_inputs_json(state: State, folder: StageFolder) -> None:
    """Writes `artifacts/inputs.json` if the data come from a table, such as a CSV file."""
    data = state.data
    if data.preparation is None:
        return
    # The device needs the mean and std with which the model was trained. They may differ from the
    # mean and std of these data.
    used = data.preparation.with_standardisation(data.preprocess, data.class_names)
    write_json_with_checksum(folder.run / "artifacts" / INPUTS, used.to_json(), folder.run)
