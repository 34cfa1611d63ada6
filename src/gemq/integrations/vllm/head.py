"""The output head of a checkpoint that stores it once, as the embedding, in a vLLM model that does not tie the two.

vLLM's OLMoE, for one, ignores ``tie_word_embeddings`` and would run with a head that was never loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

if TYPE_CHECKING:
    from gemq.integrations.vllm.method import Checkpoint


class TiedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's own method, which then loads the embedding into the head. Where vLLM ties them this changes nothing."""

    def __init__(self, prefix: str, checkpoint: Checkpoint) -> None:
        super().__init__()
        self._prefix, self._checkpoint = prefix, checkpoint

    def process_weights_after_loading(self, layer: Any) -> None:
        reader = self._checkpoint.reader
        tied = reader.skeleton.all_tied_weights_keys.get(f"{self._prefix}.weight")
        if tied in reader.found and f"{self._prefix}.weight" not in reader.found:
            layer.weight_loader(layer.weight, reader.tensor(tied))
        super().process_weights_after_loading(layer)
