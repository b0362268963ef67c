"""From a recipe to a run: the recipe's text and settings, the runner, sweeps, single commands."""
