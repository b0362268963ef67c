"""Differential privacy: clipping with a stated sensitivity, noise, the accountant, the plan and its ledger.

Import from the modules: `accounting` must answer on the command line without loading torch.
"""
