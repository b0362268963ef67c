"""The sparsify stage: settings, masks, and a training in which pruned weights stay zero."""
