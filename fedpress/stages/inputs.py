"""Writes `preparation.json`: how raw data, such as a row, become the network's input."""

from __future__ import annotations

from pathlib import Path

from fedpress.workspace.atomic import write_json_with_checksum
from fedpress.workspace.stage_folder import PREPARATION
from fedpress.workspace.state import State


def write_preparation(state: State, folder: Path, run: Path) -> None:
    """Writes `preparation.json` into `folder` if the data say how raw ones become inputs.

    Args:
        state: the state; its spec has the preparation.
        folder: the folder of the model, such as `RUN/artifacts`.
        run: folder of the run, whose list of checksums gets a line.
    """
    if state.spec.preparation:
        write_json_with_checksum(folder / PREPARATION, state.spec.preparation, run)
