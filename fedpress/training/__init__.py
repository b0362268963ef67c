"""One training loop, one evaluation, optimizers, augmentation."""
