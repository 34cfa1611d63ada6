"""Quantization arithmetic: functions on tensors. Must not import models or files."""
