"""Prunes channels: traces a network, scores its channels, plans, removes, checks the result."""
