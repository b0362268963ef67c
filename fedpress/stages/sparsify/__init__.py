"""The sparsify stage: settings, masks, and the training that keeps them."""
