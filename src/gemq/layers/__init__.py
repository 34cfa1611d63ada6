"""Quantization of one layer: candidates at every width, reconstruction at the chosen widths, training."""
