"""Torch layers: resizing, masks, quantized layers, and sizes written into forward code."""
