"""The kinds of stages of a recipe: each is a settings class with methods `check` and `run`."""
