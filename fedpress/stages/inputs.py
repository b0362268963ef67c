"""What lies beside a file for a device where the data come from a table: how raw rows become its inputs."""

from __future__ import annotations

from fedpress.workspace.atomic import write_json_with_checksum
from fedpress.workspace.stage_folder import INPUTS, StageFolder
from fedpress.workspace.state import State


def write_inputs_json(state: State, folder: StageFolder) -> None:
    """Writes `artifacts/inputs.json`; nothing where the data come from no table."""
    data = state.data
    if data.preparation is None:
        return
    # Commands may put another standardisation in the place of the data's own: that of the model counts.
    used = data.preparation.with_standardisation(data.preprocess, data.class_names)
    write_json_with_checksum(folder.run / "artifacts" / INPUTS, used.to_json(), folder.run)
