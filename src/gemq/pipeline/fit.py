"""Does a packed model fit? The largest budget for the memory of a GPU, and the context that other budgets leave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from gemq.errors import UserError
from gemq.models.source import Source
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.codes_stage import expected_recipe
from gemq.planning.expert_sizes import experts_at
from gemq.planning.serving_memory import ServingMemory
from gemq.recipe import Recipe
from gemq.recipe_values import MAX_SIZE_BYTES
from gemq.runtime.memory import DEFAULT_CONTEXT, gigabytes

TABLE_BUDGETS = (1.5, 2.0, 2.5, 3.0, 4.0)
"""Budgets in bits that are compared."""

STORED_STEPS_PER_BIT = 10_000
"""Budgets in stored bits are rounded to this, as the smallest budget of an allocation is."""


@dataclass(frozen=True)
class FitRow:
    """What a budget takes, and the context that it leaves room for.

    Attributes:
        bits: nominal bits per expert weight.
        weight_bytes: bytes of all weights on a GPU.
        total_bytes: bytes of everything on a GPU at the requested context.
        context: tokens of a sequence that fit, at most the model's maximum. 0: not even the weights fit.
    """

    bits: float
    weight_bytes: int
    total_bytes: int
    context: int


@dataclass(frozen=True)
class Fit:
    """The largest budget that fits into the memory of a GPU, and what it takes. An estimate.

    Attributes:
        memory_bytes: of each GPU.
        context: tokens of a sequence, prompt and answer.
        batch: sequences at the same time.
        gpus: GPUs that share the model. Bytes are those of one of them.
        bits: the largest budget in nominal bits per expert weight, rounded down to a hundredth.
        stored_bits: the same with scales and offsets. A budget that fits with any kind of codes.
        weight_bytes: of all weights at this budget.
        cache_bytes: of keys, values and states of all sequences.
        working_bytes: of CUDA, its libraries, and temporary tensors.
        longest_context: tokens that the model takes at most.
        windowed_layers: layers whose cache keeps only a window of tokens.
        static_cache_bytes: bytes of a cache that keeps all tokens in these layers too, as ``gemq generate`` does.
        estimated_layers: layers whose cache could not be measured, and counts as that of full attention.
        rows: what other budgets take.
    """

    memory_bytes: int
    context: int
    batch: int
    gpus: int
    bits: float
    stored_bits: float
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    longest_context: int
    windowed_layers: int
    static_cache_bytes: int
    estimated_layers: int
    rows: tuple[FitRow, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of everything at the largest budget."""
        return self.weight_bytes + self.cache_bytes + self.working_bytes


def fit(
    model: Any,
    structure: Structure,
    recipe: Recipe,
    memory: int,
    *,
    context: int | None = None,
    batch: int = 1,
    gpus: int = 1,
    flag: str = "--memory",
) -> Fit:
    """Find the largest budget that fits into the memory of a GPU.

    Args:
        model: on the meta device.
        structure: of the model.
        recipe: candidate widths, group size and width of dense linears. Its budget is one of those compared.
        memory: bytes of each GPU.
        context: tokens of a sequence. None: 8192, or the model's maximum if that is less.
        batch: sequences at the same time.
        gpus: GPUs that share the model.
        flag: that set the memory, for messages.

    Raises:
        UserError: no budget fits, or the model does not take this context.
    """
    # Without --widths a budget in bytes has the widest range of candidate widths.
    ladder = recipe if recipe.widths is not None else recipe.replace(size=MAX_SIZE_BYTES)
    serving = ServingMemory(model, structure, ladder, gpus)
    if context is None:
        context = min(DEFAULT_CONTEXT, serving.longest_context)
    if context > serving.longest_context:
        raise UserError(f"--context {context} is longer than the model takes: give at most {serving.longest_context}")
    bits = serving.largest_bits(memory, context, batch)
    if bits is None:
        low = ladder.candidate_widths[0].bits
        total = serving.total_bytes(low, context, batch)
        cache_text = gigabytes(serving.cache_bytes(context, batch))
        working_text = gigabytes(serving.working_bytes(low, context, batch))
        raise UserError(
            f"no budget fits into {gigabytes(memory)} with {context:,} tokens of context: at {low:g} bits weights take "
            f"{gigabytes(serving.weight_bytes(low))}, the cache {cache_text}, CUDA and work space {working_text}; "
            f"give at least {flag} {gigabytes(total)}"
        )
    cache = serving.cache
    return Fit(
        memory_bytes=memory,
        context=context,
        batch=batch,
        gpus=gpus,
        bits=bits,
        stored_bits=_stored_bits(serving, bits),
        weight_bytes=serving.weight_bytes(bits),
        cache_bytes=serving.cache_bytes(context, batch),
        working_bytes=serving.working_bytes(bits, context, batch),
        longest_context=serving.longest_context,
        windowed_layers=cache.windowed_layers,
        static_cache_bytes=batch * cache.unbounded_bytes(context),
        estimated_layers=cache.estimated_layers,
        rows=_rows(serving, memory, context, batch, {bits, *([recipe.bits] if recipe.bits else [])}),
    )


def _stored_bits(serving: ServingMemory, bits: float) -> float:
    """Stored bits at a budget of ``bits``: of the widest candidates exactly, else rounded up to four decimals."""
    stored = Fraction(8 * experts_at(serving.structure, serving.recipe, bits), serving.structure.expert_weights)
    is_widest = bits >= serving.recipe.candidate_widths[-1].bits
    return float(stored) if is_widest else math.ceil(stored * STORED_STEPS_PER_BIT) / STORED_STEPS_PER_BIT


def _rows(serving: ServingMemory, memory: int, context: int, batch: int, budgets: set[float]) -> tuple[FitRow, ...]:
    """A row for each of the table's budgets and ``budgets`` within the candidate widths, ascending."""
    widths = serving.recipe.candidate_widths
    rows = []
    for bits in sorted({*TABLE_BUDGETS, *budgets}):
        if widths[0].bits <= bits <= widths[-1].bits:
            row = FitRow(
                bits=bits,
                weight_bytes=serving.weight_bytes(bits),
                total_bytes=serving.total_bytes(bits, context, batch),
                context=serving.longest_fitting_context(bits, memory, batch),
            )
            rows.append(row)
    return tuple(rows)


def fitting_recipe(
    model: str | Path,
    recipe: Recipe,
    memory: int,
    device: torch.device,
    *,
    context: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """Return a recipe with the largest budget that fits into the memory of a GPU.

    The budget is one of stored bits, since the job may take affine codes where trellis codes were expected, and these
    have more scales.

    Args:
        model: local directory or hub id. No weights are read.
        recipe: its budget is replaced.
        memory: bytes of the GPU that serves the model.
        device: that the job runs on. It decides on the codes.
        context: as for ``fit``.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow Python code that comes with the model to run.

    Raises:
        UserError: as for ``fit``.
    """
    source = Source.resolve(str(model), revision=revision, trust_remote_code=trust_remote_code, weights=False)
    skeleton = source.skeleton()
    structure = find_structure(skeleton)
    expected = expected_recipe(recipe, device, structure)
    largest = fit(skeleton, structure, expected, memory, context=context, flag="--fit")
    return recipe.replace(stored_bits=largest.stored_bits)
