"""Serving packed checkpoints with vLLM (0.30 to 0.33): found through the entry point ``vllm.general_plugins``.

``plugin`` is that entry point; ``method`` decides which layer is packed; ``experts`` and ``linears`` are vLLM's two
kinds of layer; ``split`` says what a tensor-parallel rank holds; ``ops`` is what the compiled graph calls.
"""
