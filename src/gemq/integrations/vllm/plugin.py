"""vLLM's entry point. It runs in every process that vLLM starts, for every model: it stays light and cannot fail."""

from __future__ import annotations


def register() -> None:
    """Makes vLLM know gemq checkpoints. Calling it again does nothing new."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from gemq.checkpoint.format import QUANT_METHOD
    from gemq.integrations.vllm.method import GemqQuantization

    register_quantization_config(QUANT_METHOD)(GemqQuantization)
