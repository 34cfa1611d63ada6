"""Checks before a job costs anything, from shapes, headers and small files. Nothing is computed.

All of this would also fail later, but only after hours of work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemq.allocation.problem import Allocation, Budget, Problem, allocate, smallest_budget
from gemq.calibration.sources import SELF, check_sources, host_bytes
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.small_files import small_files
from gemq.errors import UserError
from gemq.models.byte_sizes import candidate_bytes, linear_bytes, unquantized_bytes
from gemq.models.config_values import embedding_rows
from gemq.models.source import Source, calibration_seq_len, configured_types, pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.allocation_stage import shape_problem, with_all_widths
from gemq.pipeline.codes_stage import expected_recipe
from gemq.pipeline.scores_stage import gradient_bytes
from gemq.pipeline.stage_costs import Footprint, check_bounds
from gemq.recipe import Recipe
from gemq.recipe_defaults import DEFAULT_BITS
from gemq.runtime.files import check_free_space, check_writable, free_space, read_input
from gemq.runtime.memory import MemoryBudget, gigabytes

MAX_ALLOCATION_BYTES = 64 << 20
"""Upper bound for an allocation file."""

TOKEN_BYTES = 16
"""Host memory for a calibration token: its index, and the random number that it is sampled with."""

SIZE_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


@dataclass(frozen=True)
class Checked:
    """A model and a recipe that passed all checks that need neither weights nor a work directory.

    Attributes:
        model: on the meta device.
        structure: of the model.
        recipe: of the job, with the codes that are expected.
        seq_len: tokens per calibration window.
        fixed_bytes: of the checkpoint's tensors outside the experts.
        allocation: one that meets the budget, or the one of the file.
    """

    model: Any
    structure: Structure
    recipe: Recipe
    seq_len: int
    fixed_bytes: int
    allocation: Allocation

    @property
    def stored_bytes(self) -> int:
        """Bytes of all the checkpoint's tensors."""
        return self.fixed_bytes + self.allocation.stored_bytes


def check_model(
    source: Source,
    recipe: Recipe,
    allocation: Path | None,
    device: torch.device,
    *,
    reconstruct: bool,
    texts: bool = True,
) -> Checked:
    """Checks that a job with this model and recipe could succeed.

    Args:
        source: the model. It needs no weights.
        recipe: what the user requests.
        allocation: file with the widths of all experts, if any.
        device: that the job runs on.
        reconstruct: whether the model is reconstructed.
        texts: whether calibration texts are still to be read.

    Raises:
        UserError: it could not.
    """
    model = source.skeleton()
    structure = find_structure(model)
    recipe = expected_recipe(recipe, device, structure)
    seq_len = calibration_seq_len(source.config(), recipe.seq_len)
    if texts:
        check_sources(
            recipe.calibration,
            source.tokenizer,
            seq_len,
            column=recipe.calibration_column,
            embeddings=embedding_rows(model),
            generates_windows=recipe.total_tokens > recipe.num_windows * seq_len,
        )
    fixed = fixed_bytes(model, structure, recipe, configured_types(model))
    checked_allocation = check_allocation(structure, recipe, fixed, allocation, reconstruct)
    return Checked(model, structure, recipe, seq_len, fixed, checked_allocation)


def check_job(
    source: Source,
    recipe: Recipe,
    out: Path,
    work: Path,
    allocation: Path | None,
    memory: MemoryBudget,
    *,
    new: bool,
    reconstruct: bool,
    texts: bool = True,
) -> None:
    """Checks that a job could succeed.

    Args:
        source: the model, with weights.
        recipe: what the user requests.
        out: directory of the checkpoint.
        work: the work directory.
        allocation: file with the widths of all experts, if any.
        memory: the job's bounds.
        new: the work directory is empty, so its disk must hold all candidates.
        reconstruct: whether the model is reconstructed.
        texts: whether calibration texts are still to be read.

    Raises:
        UserError: it could not.
    """
    source.check_weights()
    small_files(source.path)
    checked = check_model(source, recipe, allocation, memory.device, reconstruct=reconstruct, texts=texts)
    dtype = pick_dtype(recipe.dtype, memory.device)
    text_bytes = host_bytes(recipe.calibration) if texts else 0
    footprint = Footprint(checked.structure, recipe, checked.model.config, dtype, memory.device)
    check_bounds(memory, footprint, checked.model, text_bytes)
    if not is_packed(out):
        check_writable(out)
        check_free_space(out, checked.stored_bytes)
    if new:
        check_writable(work)
        needed = candidate_bytes(checked.structure, checked.recipe)
        if checked.recipe.codes != "affine":
            needed += gradient_bytes(checked.structure) * max(1, len(recipe.progressive))
        check_free_space(work, needed)
        check_tokens(checked, recipe, work, memory, dtype)


def check_tokens(checked: Checked, recipe: Recipe, work: Path, memory: MemoryBudget, dtype: torch.dtype) -> None:
    """Checks that memory and disk hold the calibration activations, as far as the recipe alone determines them.

    Texts may have fewer windows than requested. Windows that the model writes are never fewer.

    Raises:
        UserError: they do not.
    """
    generated_tokens = recipe.num_windows * checked.seq_len if SELF in recipe.calibration else 0
    tokens = max(recipe.total_tokens, generated_tokens)
    hidden = checked.model.config.get_text_config().hidden_size
    required = tokens * hidden * dtype.itemsize  # between two layers
    available = memory.on_device.limit + free_space(work)
    if memory.device.type == "cuda":
        available += memory.host.limit
    if required > available or tokens * TOKEN_BYTES > memory.host.limit:
        raise UserError(
            f"{tokens:,} tokens of calibration do not fit: between two layers they take {gigabytes(required)}, and "
            f"memory and the disk of {work} have {gigabytes(available)}; set num_windows or total_tokens lower"
        )


def check_allocation(
    structure: Structure, recipe: Recipe, fixed: int, allocation: Path | None, reconstruct: bool
) -> Allocation:
    """An allocation that meets the budget, or the one in a file.

    Args:
        structure: of the model.
        recipe: the budget and how it is allocated.
        fixed: bytes of the checkpoint outside the experts.
        allocation: file with the widths of all experts, if any.
        reconstruct: whether the model is reconstructed.

    Raises:
        UserError: there is none.
    """
    problem = shape_problem(structure, recipe)
    if allocation is not None:
        return read_allocation(allocation, problem, recipe, reconstruct)
    budget = expert_budget(recipe, fixed, problem)
    return allocate(problem, budget, recipe.allocate, layer_rule=recipe.layer_rule)


def expert_budget(recipe: Recipe, fixed: int, problem: Problem) -> Budget:
    """The budget of the experts.

    Args:
        recipe: the budget that the user requests.
        fixed: bytes of the checkpoint outside the experts.
        problem: candidate widths and their bytes.

    Raises:
        UserError: the widths do not reach the budget.
    """
    if recipe.size is not None:
        smallest = smallest_budget(problem, "bytes", recipe.allocate, layer_rule=recipe.layer_rule).value
        if recipe.size < fixed + smallest:
            raise UserError(
                f"--size {_size(recipe.size)} is too small: at widths {problem.width_names} this model takes at least "
                f"{_size(fixed + smallest, round_up=True)}, of which {_size(fixed)} lie outside the experts"
            )
        return Budget("bytes", recipe.size - fixed)
    if recipe.stored_bits is not None:
        max_bits = int(problem.bytes[:, -1].sum()) * 8 / int(problem.weights.sum())
        if recipe.stored_bits > max_bits:
            raise UserError(
                f"no allocation of widths {problem.width_names} has {recipe.stored_bits:g} stored bits: "
                f"give at most {max_bits:.4g}, or quantize with a wider width among --widths"
            )
        return Budget("stored_bits", recipe.stored_bits)
    return Budget("bits", DEFAULT_BITS if recipe.bits is None else recipe.bits)


def read_allocation(path: Path, problem: Problem, recipe: Recipe, reconstruct: bool) -> Allocation:
    """The allocation of a file.

    Args:
        path: of the file.
        problem: by the candidate widths.
        recipe: of the job.
        reconstruct: whether the model is reconstructed. Otherwise it can only have the candidate widths.

    Raises:
        UserError: the file cannot be read, or does not fit the model.
    """
    allocation = Allocation.from_json(read_allocation_file(path), with_all_widths(problem, recipe), origin=str(path))
    if not reconstruct and not set(allocation.widths) <= set(problem.widths):
        raise UserError(
            f"{path} has widths between the candidates {problem.width_names}, which only a reconstructed model can "
            "have: export it with --reconstruct, or give the candidates alone"
        )
    return allocation


def read_allocation_file(path: Path) -> str:
    """The text of an allocation file. Raises UserError when it cannot be read."""
    try:
        return read_input(path, MAX_ALLOCATION_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read {path} ({reason}): give the allocation.json of a work directory") from error


def fixed_bytes(model: Any, structure: Structure, recipe: Recipe, stored_dtypes: dict[str, torch.dtype]) -> int:
    """Bytes of the checkpoint's tensors outside the experts. ``stored_dtypes``: type of each parameter in its file."""
    return unquantized_bytes(model, structure, recipe, stored_dtypes) + linear_bytes(structure, recipe)


def _size(count: float, round_up: bool = False) -> str:
    """Bytes as --size takes them. ``round_up``: never less than they are."""
    unit, scale = next((unit, scale) for unit, scale in SIZE_UNITS if count >= scale or unit == "B")
    hundredths = count / scale * 100
    rounded = math.ceil(hundredths) if round_up else round(hundredths)
    return f"{rounded / 100:g}{unit}"
