"""Kernels for few tokens: linears, experts and attention of a decode step."""
