"""Differentiable kernels for training with packed or unpacked experts."""
