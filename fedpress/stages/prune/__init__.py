"""The prune stage: removes whole channels, in one or several cuts."""
