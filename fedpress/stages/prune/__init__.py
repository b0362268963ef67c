"""The prune stage: settings, and the cut at work."""
