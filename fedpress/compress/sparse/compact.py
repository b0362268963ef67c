"""Sparse weights as vectors of their kept values; they live in `fedpress.compact`, where device programs find them."""

from fedpress.compact import Scatter, compact_, expand_

__all__ = ["Scatter", "compact_", "expand_"]
