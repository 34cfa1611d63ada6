"""vLLM's entry point. vLLM calls it in all of its processes, for every model, so it must be light and cannot fail."""

from __future__ import annotations


def register() -> None:
    """Register gemq's quantization method with vLLM. Further calls have no effect."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from gemq.checkpoint.format import QUANT_METHOD
    from gemq.integrations.vllm.method import GemqQuantization

    register_quantization_config(QUANT_METHOD)(GemqQuantization)
