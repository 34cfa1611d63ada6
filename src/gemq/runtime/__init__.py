"""Memory, files, processes and devices. Independent of models and of quantization."""
