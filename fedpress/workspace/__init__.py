"""A run folder, what a stage is given in it, and what it leaves."""
