"""Decoding with a static cache, compiled layers and CUDA graphs."""
