"""Defines `fedpress.recipes`, which lists the recipes that come with fedpress.

A recipe is a TOML file with the settings of a run: data, model and stages.
"""

from __future__ import annotations

from fedpress.pipeline.recipe import find, load, names


def recipes() -> dict[str, str]:
    """Returns name -> description of every recipe that comes with fedpress.

    >>> import fedpress
    >>> "digits" in fedpress.recipes()
    True
    """
    return {name: load(find(name)).description for name in names()}
