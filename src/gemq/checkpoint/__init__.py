"""Packed checkpoints: format, checksums, writing, loading into Transformers, and dense export.

Import submodules by name. ``format``, ``checksums`` and ``stored`` must not import torch or Transformers.
"""
