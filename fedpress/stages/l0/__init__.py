"""The l0 stage: settings, and the training with gates."""
