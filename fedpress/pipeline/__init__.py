"""Recipes, and everything that runs them: checks, runs, sweeps and commands of one stage."""
