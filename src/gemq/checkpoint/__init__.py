"""Packed checkpoints: the format, packing, writing, loading into Transformers and the dense twin.

Submodules are imported by name: ``format`` needs no torch, ``packing`` no Transformers.
"""
