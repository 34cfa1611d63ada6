"""GPU memory that a packed model takes where it is used: weights, cache, workspace. From shapes alone.

Counted for gemq's own decode loop and for Transformers. vLLM stores the same weights and cache, and has buffers of its
own. With several GPUs (tensor parallel) all figures are those of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from gemq.models.byte_sizes import linear_bytes, unquantized_bytes
from gemq.models.cache_size import CacheSize, cache_size
from gemq.models.prefill_memory import prefill_bytes
from gemq.models.source import configured_types, max_seq_len
from gemq.models.structure import Structure
from gemq.planning.expert_sizes import experts_at
from gemq.recipe import Recipe
from gemq.runtime.compat import transformers_private
from gemq.runtime.memory import CONTEXT_BYTES, LIBRARY_BYTES

COMMUNICATION_BYTES = 300_000_000
"""Buffers of NCCL on each of several GPUs."""

STEPS_PER_BIT = 100
"""The largest budget is rounded down to a hundredth of a bit."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that a packed model takes on each of the GPUs that serve it.

    Attributes:
        model: on the meta device.
        structure: of the model.
        recipe: widths, group size and width of dense linears. Its budget is not used.
        gpus: number of GPUs that share the model.
    """

    model: Any
    structure: Structure
    recipe: Recipe
    gpus: int = 1

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations and unquantized weights: the one in the configuration."""
        return next(iter(configured_types(self.model).values()))

    @property
    def longest_context(self) -> int:
        """Tokens that the model takes at most."""
        return max_seq_len(self.model.config)

    @cached_property
    def cache(self) -> CacheSize:
        """The cache of one sequence on one GPU."""
        return cache_size(self.model, self.structure, self.dtype, self.gpus)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all weights outside the experts. Norms, routers and gates are on every GPU."""
        unquantized = unquantized_bytes(self.model, self.structure, self.recipe, configured_types(self.model))
        vocabulary = self._vocabulary_bytes()
        divided = linear_bytes(self.structure, self.recipe) + vocabulary
        return unquantized - vocabulary + math.ceil(divided / self.gpus)

    def weight_bytes(self, bits: float) -> int:
        """Bytes of all weights at a budget of ``bits`` nominal bits per expert weight."""
        return self.dense_bytes + math.ceil(experts_at(self.structure, self.recipe, bits) / self.gpus)

    def cache_bytes(self, context: int, batch: int) -> int:
        """Bytes of the cache of ``batch`` sequences of ``context`` tokens."""
        return batch * self.cache.sequence_bytes(context)

    def loading_bytes(self, bits: float) -> int:
        """Bytes in addition to the weights while they are loaded: a layer's experts once more, to join them."""
        shares = [layer.experts.count * layer.experts.weights_per_expert for _, layer in self.structure.moe_layers]
        largest_share = max(shares) / self.structure.expert_weights
        return math.ceil(experts_at(self.structure, self.recipe, bits) * largest_share / self.gpus)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the model: CUDA, its libraries, and communication between GPUs."""
        return CONTEXT_BYTES + LIBRARY_BYTES + (COMMUNICATION_BYTES if self.gpus > 1 else 0)

    def working_bytes(self, bits: float, context: int, batch: int) -> int:
        """Bytes in addition to weights and cache for ``batch`` sequences of ``context`` tokens."""
        prefill = prefill_bytes(
            self.structure,
            self.text_config,
            self.dtype,
            context * batch,
            batch,
            has_trellis=self.recipe.codes == "trellis",
            gpus=self.gpus,
        )
        loading = self.loading_bytes(bits) - self.cache_bytes(context, batch)  # the cache is allocated after it
        return self.fixed_bytes + max(prefill, loading)

    def total_bytes(self, bits: float, context: int, batch: int) -> int:
        """Bytes of everything for ``batch`` sequences of ``context`` tokens, at a budget of ``bits``."""
        working = self.working_bytes(bits, context, batch)
        return self.weight_bytes(bits) + self.cache_bytes(context, batch) + working

    def largest_bits(self, memory: int, context: int, batch: int) -> float | None:
        """The largest budget in nominal bits with which everything fits into ``memory`` bytes; None if none does."""
        low, high = (width.bits for width in (self.recipe.candidate_widths[0], self.recipe.candidate_widths[-1]))
        if self.total_bytes(low, context, batch) > memory:
            return None
        if self.total_bytes(high, context, batch) <= memory:
            return high
        steps = _last(
            lambda steps: self.total_bytes(steps / STEPS_PER_BIT, context, batch) <= memory,
            math.floor(high * STEPS_PER_BIT),
        )
        return max(low, steps / STEPS_PER_BIT)

    def longest_fitting_context(self, bits: float, memory: int, batch: int) -> int:
        """Tokens of each of ``batch`` sequences that fit into ``memory`` at a budget of ``bits``; 0 if none do."""
        return _last(lambda tokens: self.total_bytes(bits, tokens, batch) <= memory, self.longest_context)

    def _vocabulary_bytes(self) -> int:
        """Bytes of embeddings and head, which several GPUs share."""
        tied = set(transformers_private.tied_weights(self.model))
        modules = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        weights = {id(module.weight): module.weight for module in modules if module is not None}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        total = 0
        for key, weight in weights.items():
            if names.get(key) not in tied:
                total += weight.numel() * self.dtype.itemsize
        return total


def _last(fits: Callable[[int], bool], end: int) -> int:
    """The largest number from 1 to ``end`` that fits, if all smaller numbers fit too; 0 if not even 1 does."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
