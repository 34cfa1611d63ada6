"""Kernels for many tokens: a matrix product grouped by expert."""
