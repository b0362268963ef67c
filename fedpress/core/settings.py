"""How classes of settings behave, the tables of a recipe and their rows."""

from __future__ import annotations

from pydantic import ConfigDict

SETTINGS = ConfigDict(frozen=True, extra="forbid", defer_build=True)
"""They cannot change, refuse unknown keys, and are built when first used: a run uses a few of them,
and building all makes its start longer."""
