"""Calibration: texts, windows of tokens, text that the model writes, and the activations of layers over them."""
