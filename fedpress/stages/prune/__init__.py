"""The prune stage: its settings, and the work in steps that can be resumed."""
