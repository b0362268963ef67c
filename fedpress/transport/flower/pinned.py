"""The one version of Flower that fedpress works with; switches off telemetry and update checks."""

from __future__ import annotations

import os
from importlib import metadata

from fedpress.errors import NetworkError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Environment variables by which Flower sends no telemetry, checks for no update and installs no
packages."""
# Set before flwr is imported, because flwr reads them only then.
os.environ.update(QUIET)

FLOWER = "1.42.0"
"""The version of Flower whose private modules are used here."""


def check_installed() -> None:
    """Checks that the version `FLOWER` of Flower is installed.

    Raises:
        NetworkError: if it is not; the error has the command that installs it.
    """
    cure = 'pip install "fedpress[network]"'
    try:
        found = metadata.version("flwr")
    except metadata.PackageNotFoundError as error:
        raise NetworkError("Flower is not installed", place="network", cure=cure) from error
    if found != FLOWER:
        raise NetworkError(f"got Flower {found}, expected {FLOWER}", place="network", cure=cure)
