"""What can be refused before a job costs anything: found from shapes, headers and small files, nothing is computed.

Everything here would also be noticed later, but then hours may have gone and a work directory would be left behind.
"""

from __future__ import annotations

from pathlib import Path

from gemq.allocate import Allocation, Budget, Problem, allocate, smallest_budget
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.small_files import small_files
from gemq.data.sources import check_sources, host_bytes
from gemq.errors import UserError
from gemq.files import check_free_space, check_writable
from gemq.models.config_values import embedding_rows
from gemq.models.source import Source, calibration_window, configured_types, pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.recipe import DEFAULT_BITS, Recipe
from gemq.resources.footprint import check_bounds
from gemq.resources.memory import Memory
from gemq.sizes import ladder_bytes, linear_bytes, other_bytes
from gemq.stages import shape_problem


def check_output(out: Path, *, resume: bool) -> None:
    """Refuses an output that is there already; a resumed job may find its own."""
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not (resume and is_packed(out)):
        raise UserError(f"{out} exists: name another output, or delete it first")


def check_job(
    source: Source, recipe: Recipe, out: Path, work: Path, allocation: Path | None, memory: Memory, *, new: bool
) -> None:
    """Raises UserError for a model, a recipe, directories or bounds with which a job could not end well.

    new: nothing is in the work directory yet, so its disk must hold all of the ladder
    """
    a, b = out.resolve(), work.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UserError(f"{out} and the work directory {work} lie in each other: name another output")
    model = source.skeleton()
    structure = find_structure(model)
    source.check_weights()
    small_files(source.path)
    texts = host_bytes(recipe.calib)
    check_bounds(memory, model, structure, recipe, pick_dtype(recipe.dtype, memory.device), texts)
    window = calibration_window(source.config(), recipe.window)
    check_sources(
        recipe.calib,
        source.tokenizer,
        window,
        column=recipe.calib_column,
        embeddings=embedding_rows(model),
        written=recipe.total_tokens > recipe.windows * window,
    )
    fixed = other_bytes(model, structure, recipe, configured_types(model)) + linear_bytes(structure, recipe)
    size = fixed + check_allocation(structure, recipe, fixed, allocation).stored_bytes
    if not is_packed(out):
        check_writable(out)
        check_free_space(out, size)
    if new:
        check_writable(work)
        check_free_space(work, ladder_bytes(structure, recipe))


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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: give the allocation.json of a work directory") from error
    return Allocation.from_json(text, problem, origin=str(path))


def _size(count: float, up: bool = False) -> str:
    """Bytes as --size takes them; ``up``: never less than they are."""
    unit, scale = next((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= s or s == 1)
    hundredths = count / scale * 100
    return f"{(-(-hundredths // 1) if up else round(hundredths)) / 100:g}{unit}"
