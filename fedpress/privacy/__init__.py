"""Differential privacy: clipping, noise, per-example gradients, the accountant and the ledger.

Nothing is imported here: `fedpress privacy epsilon` must answer without loading torch.
"""
