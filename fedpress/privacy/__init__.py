"""Differential privacy: clipping, noise, per-example gradients, the accountant and the ledger.

Nothing is imported here, so that `fedpress privacy epsilon` runs without loading torch.
"""
