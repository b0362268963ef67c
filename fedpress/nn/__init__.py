"""About torch layers: resizing them, masks, quantized layers, sizes written into forward code."""
