"""What clients and server do with the model: one row per algorithm."""
