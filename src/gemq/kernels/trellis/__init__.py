"""Kernels of experts with trellis codes."""
