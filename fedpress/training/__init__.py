"""The training loop, evaluation, optimizers, learning-rate schedules and augmentation."""
