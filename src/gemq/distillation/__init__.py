"""Distillation of the packed model towards the full-precision model."""
