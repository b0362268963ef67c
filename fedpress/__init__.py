"""fedpress makes a neural network small, trains it where the private data lives, and ships it to a device."""

__version__ = "0.1.0"
