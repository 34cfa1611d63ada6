"""The output head of a checkpoint with tied embeddings, in a vLLM model that does not tie them.

For example, vLLM's OLMoE ignores ``tie_word_embeddings`` and would run with a head that was never loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.integrations.vllm.method import Checkpoint


class TiedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's own method, which also loads the embedding into the head. Has no effect if vLLM ties them."""

    def __init__(self, prefix: str, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._prefix, self._checkpoint = prefix, checkpoint

    def process_weights_after_loading(self, layer: Any) -> None:
        """Load the embedding into the head if the checkpoint has no other weights for it."""
        reader = self._checkpoint.reader
        tied = transformers_private.tied_weights(reader.skeleton).get(f"{self._prefix}.weight")
        if tied in reader.specs and f"{self._prefix}.weight" not in reader.specs:
            layer.weight_loader(layer.weight, reader.tensor(tied))
        super().process_weights_after_loading(layer)
