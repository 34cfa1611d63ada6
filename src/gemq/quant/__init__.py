"""Quantization mathematics: pure functions on tensors, no models, no files."""
