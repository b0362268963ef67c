"""Basics that all folders use: random streams, flat parameter vectors, inputs, files, limits."""
