"""Noise: Gaussian, Skellam, correlated over rounds, and made by clients together."""
