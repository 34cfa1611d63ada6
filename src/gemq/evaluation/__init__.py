"""Evaluation, generation and benchmarks of a finished model."""
