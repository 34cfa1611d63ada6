"""Quantization of one layer: candidates at every width, refinement at the chosen widths, training."""
