"""The stages of a recipe, a table: one settings class with `kind`, `check` and `run` each."""
