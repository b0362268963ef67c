"""The sparsify stage: sets single weights to zero, and trains the other weights."""
