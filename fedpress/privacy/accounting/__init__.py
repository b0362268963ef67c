"""What privacy a run has spent: mechanism events, their composition, epsilon and delta."""
