"""Runs recipes: TOML files that name the data, the model and the stages, such as prune or train."""
