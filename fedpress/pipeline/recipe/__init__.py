"""The recipe: TOML text becomes checked settings."""
