"""Sparse weights as vectors of their kept values: see `fedpress.nn.compact`, where device programs find them."""

from fedpress.nn.compact import Scatter, compact_, expand_

__all__ = ["Scatter", "compact_", "expand_"]
