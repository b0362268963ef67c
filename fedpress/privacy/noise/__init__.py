"""Noise that hides one unit: Gaussian, Skellam, correlated, made together; and where it is drawn from."""
