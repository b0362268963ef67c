"""Writes how raw rows of a table become a network's inputs, beside the file for a device."""

from __future__ import annotations

from fedpress.workspace.atomic import write_json_with_checksum
from fedpress.workspace.stage_folder import INPUTS, StageFolder
from fedpress.workspace.state import State


def write_inputs_json(state: State, folder: StageFolder) -> None:
    """Writes `artifacts/inputs.json`; nothing if the data do not come from a table."""
    data = state.data
    if data.preparation is None:
        return
    # With the model's standardisation, which a command may have put in place of the data's own.
    used = data.preparation.with_standardisation(data.preprocess, data.class_names)
    write_json_with_checksum(folder.run / "artifacts" / INPUTS, used.to_json(), folder.run)
