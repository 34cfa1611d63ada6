"""Serving of packed checkpoints with vLLM (0.30 to 0.33), which finds it by the entry point ``vllm.general_plugins``.

``plugin`` is that entry point. ``method`` decides which layers are packed. ``experts``, ``linears`` and ``head`` are
the kinds of layers. ``served_experts`` are the experts of a rank, and ``split`` computes what a tensor-parallel rank
holds. ``row_order`` follows a change of vLLM's loader. ``ops`` has the operators of compiled graphs.
"""
