"""Basics that all rooms use: random streams, flat parameter vectors, inputs, files, limits."""
