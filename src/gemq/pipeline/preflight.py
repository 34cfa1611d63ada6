"""What can be refused before a job costs anything: found from shapes, headers and small files, nothing is computed.

Everything here would also be noticed later, but then hours may have gone and a work directory would be left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemq.allocation.problem import Allocation, Budget, Problem, allocate, smallest_budget
from gemq.calibration.sources import SELF, check_sources, host_bytes
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.small_files import small_files
from gemq.errors import UserError
from gemq.models.byte_sizes import ladder_bytes, linear_bytes, other_bytes
from gemq.models.config_values import embedding_rows
from gemq.models.source import Source, calibration_window, configured_types, pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.layer_stages import shape_problem
from gemq.planning.memory_model import check_bounds
from gemq.recipe import DEFAULT_BITS, Recipe
from gemq.runtime.files import check_free_space, check_writable, free_space, read_input
from gemq.runtime.memory import Memory, gigabytes

MAX_ALLOCATION_BYTES = 64 << 20
"""Upper bound for an allocation file."""

TOKEN_BYTES = 16
"""Host memory for a calibration token: its number, and the random number that it is drawn by."""


@dataclass(frozen=True)
class Checked:
    """What a recipe would do to a model, which passed all checks that need neither weights nor a work directory.

    model:       on the meta device
    fixed_bytes: of the checkpoint's tensors outside the experts
    allocation:  one that meets the budget, or the one of the file
    """

    model: Any
    structure: Structure
    window: int
    fixed_bytes: int
    allocation: Allocation

    @property
    def stored_bytes(self) -> int:
        """Of all the checkpoint's tensors."""
        return self.fixed_bytes + self.allocation.stored_bytes


def check_model(source: Source, recipe: Recipe, allocation: Path | None, *, texts: bool = True) -> Checked:
    """Raises UserError for a model and a recipe with which no job could end well.

    Args:
        source: needs no weights
        recipe: what the user asks for
        allocation: file with the widths of all experts, if any
        texts: whether calibration texts are still to be read
    """
    model = source.skeleton()
    structure = find_structure(model)
    window = calibration_window(source.config(), recipe.window)
    if texts:
        check_sources(
            recipe.calib,
            source.tokenizer,
            window,
            column=recipe.calib_column,
            embeddings=embedding_rows(model),
            written=recipe.total_tokens > recipe.windows * window,
        )
    fixed = other_bytes(model, structure, recipe, configured_types(model)) + linear_bytes(structure, recipe)
    return Checked(model, structure, window, fixed, check_allocation(structure, recipe, fixed, allocation))


def check_job(
    source: Source,
    recipe: Recipe,
    out: Path,
    work: Path,
    allocation: Path | None,
    memory: Memory,
    *,
    new: bool,
    texts: bool = True,
) -> None:
    """Raises UserError for a model, a recipe, directories or bounds with which a job could not end well.

    new: nothing is in the work directory yet, so its disk must hold all of the ladder
    texts: whether calibration texts are still to be read
    """
    source.check_weights()
    small_files(source.path)
    checked = check_model(source, recipe, allocation, texts=texts)
    dtype = pick_dtype(recipe.dtype, memory.device)
    text_bytes = host_bytes(recipe.calib) if texts else 0
    check_bounds(memory, checked.model, checked.structure, recipe, dtype, text_bytes)
    if not is_packed(out):
        check_writable(out)
        check_free_space(out, checked.stored_bytes)
    if new:
        check_writable(work)
        check_free_space(work, ladder_bytes(checked.structure, recipe))
        check_tokens(checked, recipe, work, memory, dtype)


def check_tokens(checked: Checked, recipe: Recipe, work: Path, memory: Memory, dtype: torch.dtype) -> None:
    """Raises UserError for more calibration than memory and disk hold, as far as the recipe alone tells.

    Texts may have fewer windows than are asked for; what the model writes itself comes whole.
    """
    tokens = max(recipe.total_tokens, recipe.windows * checked.window if SELF in recipe.calib else 0)
    hidden = checked.model.config.get_text_config().hidden_size
    room = memory.on_device.limit + free_space(work) + (memory.host.limit if memory.device.type == "cuda" else 0)
    needed = tokens * hidden * dtype.itemsize  # between two layers
    if needed > room or tokens * TOKEN_BYTES > memory.host.limit:
        raise UserError(
            f"{tokens:,} tokens of calibration do not fit: between two layers they take {gigabytes(needed)}, and "
            f"memory and the disk of {work} have {gigabytes(room)}; set windows or total_tokens lower"
        )


def check_allocation(structure: Structure, recipe: Recipe, fixed_bytes: int, allocation: Path | None) -> Allocation:
    """Any allocation that meets the budget, or the one in a file. Raises UserError when there is none."""
    problem = shape_problem(structure, recipe)
    if allocation is not None:
        return read_allocation(allocation, problem)
    return allocate(problem, expert_budget(recipe, fixed_bytes, problem), recipe.allocate, layer_rule=recipe.layer_rule)


def expert_budget(recipe: Recipe, fixed_bytes: int, problem: Problem) -> Budget:
    """What the recipe leaves to the experts when ``fixed_bytes`` lie outside them."""
    if recipe.size is not None:
        least = smallest_budget(problem, "bytes", recipe.allocate, layer_rule=recipe.layer_rule).value
        if recipe.size < fixed_bytes + least:
            raise UserError(
                f"--size {_size(recipe.size)} is too small: at widths {problem.width_names} this model takes at least "
                f"{_size(fixed_bytes + least, up=True)}, of which {_size(fixed_bytes)} lie outside the experts"
            )
        return Budget("bytes", recipe.size - fixed_bytes)
    if recipe.stored_bits is not None:
        most = int(problem.bytes[:, -1].sum()) * 8 / int(problem.weights.sum())
        if recipe.stored_bits > most:
            raise UserError(
                f"no allocation of widths {problem.width_names} has {recipe.stored_bits:g} stored bits: "
                f"give at most {most:.4g}, or quantize with a wider width among --widths"
            )
        return Budget("stored_bits", recipe.stored_bits)
    return Budget("bits", DEFAULT_BITS if recipe.bits is None else recipe.bits)


def read_allocation(path: Path, problem: Problem) -> Allocation:
    """The allocation of a file. Raises UserError when it cannot be read or does not fit the model."""
    return Allocation.from_json(read_allocation_file(path), problem, origin=str(path))


def read_allocation_file(path: Path) -> str:
    try:
        return read_input(path, MAX_ALLOCATION_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read {path} ({reason}): give the allocation.json of a work directory") from error


def _size(count: float, up: bool = False) -> str:
    """Bytes as --size takes them; ``up``: never less than they are."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= s or s == 1)
    hundredths = count / scale * 100
    return f"{(-(-hundredths // 1) if up else round(hundredths)) / 100:g}{unit}"
