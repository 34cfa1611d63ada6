"""The size curve: what each budget over the ladder's range takes and predicts, from a work directory's scores.

Only the allocation is solved, once for every point: neither weights nor the ladder are read. The scores are those
around the full-precision model, as in an ``export`` without ``finish``.
"""

from __future__ import annotations

import csv
import io
import itertools
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemq.allocation.problem import Budget, Problem, allocate, smallest_budget
from gemq.errors import UserError
from gemq.models.byte_sizes import linear_bytes, other_bytes
from gemq.models.source import configured_types
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.allocation_stage import Costs, layer_costs, shape_problem
from gemq.pipeline.job_record import check_config, recorded_job
from gemq.pipeline.workdir import Stage, WorkDir, layer_file
from gemq.quant.widths import nominal_bits
from gemq.recipe import Recipe
from gemq.runtime.files import replacing, write_text

STEP = 0.125
"""Bits between two budgets of a curve."""


@dataclass(frozen=True)
class CurvePoint:
    """One budget of ``bits`` nominal bits per expert weight, and what its allocation takes and predicts.

    nominal_bits, stored_bits: that it uses per expert weight, without and with scales and offsets
    expert_bytes:   of all experts
    stored_bytes:   of the whole checkpoint's tensors
    predicted_cost: sum of the chosen scores
    uniform_cost:   the same for the best mixture of two candidate widths in equal shares of every layer, on average
    """

    bits: float
    nominal_bits: float
    stored_bits: float
    expert_bytes: int
    stored_bytes: int
    predicted_cost: float
    uniform_cost: float


@dataclass(frozen=True)
class Curve:
    """``points`` in order of budget. ``original_bytes``: of the full-precision model."""

    model: str
    method: str
    original_bytes: int
    points: tuple[CurvePoint, ...]

    @property
    def unit(self) -> float:
        """The cost of uniform widths at the smallest budget: costs are shown as shares of it."""
        return self.points[0].uniform_cost or 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def size_curve(
    work: str | Path,
    method: str | None = None,
    step: float = STEP,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Curve:
    """The curve of a work directory of ``quantize``, in seconds.

    Args:
        work: the work directory
        method: ``global`` or ``layerwise``; None is the recipe's own if it goes by scores, else global
        step: bits between two budgets
        model: where the full-precision model lies now, if it was moved
        trust_remote_code: lets code of the model run

    Raises:
        UserError: the directory holds no complete scores, or is damaged.
    """
    with WorkDir.existing(Path(work)) as directory:
        source, recipe, record = recorded_job(directory.path, model=model, trust_remote_code=trust_remote_code)
        check_config(source, record)
        skeleton = source.skeleton()
        structure = find_structure(skeleton)
        problem = _scored_problem(directory, structure, recipe)
    method = method or (recipe.allocate if recipe.allocate == "layerwise" else "global")
    if method not in ("global", "layerwise"):
        raise UserError(f"--curve shows allocations by scores, not {method}: choose global or layerwise")
    stored = configured_types(skeleton)
    fixed = other_bytes(skeleton, structure, recipe, stored) + linear_bytes(structure, recipe)
    least = smallest_budget(problem, "bits", method, layer_rule=recipe.layer_rule).value
    points = []
    for bits in budgets(nominal_bits(problem.widths[0]), nominal_bits(problem.widths[-1]), step):
        if bits < least:
            continue
        budget = Budget("bits", bits)
        found = allocate(problem, budget, method, layer_rule=recipe.layer_rule, seed=recipe.seed)
        points.append(
            CurvePoint(
                bits,
                found.nominal_bits,
                found.stored_bits,
                found.stored_bytes,
                fixed + found.stored_bytes,
                found.predicted_cost,
                uniform_cost(problem, bits),
            )
        )
    original = sum(p.numel() * stored[name].itemsize for name, p in skeleton.named_parameters())
    return Curve(str(source.path), method, original, tuple(points))


def uniform_cost(problem: Problem, bits: float) -> float:
    """The lowest cost of uniform widths, or of two widths mixed at random, with at most ``bits`` nominal bits.

    It is the mean over all draws of a mixture, and so falls steadily as budgets grow.
    """
    widths = [nominal_bits(width) for width in problem.widths]
    costs = problem.costs.sum(axis=0).tolist()
    reachable = [(b, cost) for b, cost in zip(widths, costs, strict=True) if b <= bits]
    found = [cost for _, cost in reachable]
    for (a, cost_a), (b, cost_b) in itertools.product(reachable, zip(widths, costs, strict=True)):
        if b > bits:
            found.append(cost_a + (cost_b - cost_a) * (bits - a) / (b - a))
    return min(found)


def budgets(low: float, high: float, step: float) -> list[float]:
    """Multiples of ``step`` between ``low`` and ``high``, and these two."""
    inside = np.arange(np.floor(low / step) + 1, np.ceil(high / step)) * step
    return [low, *(float(b) for b in inside), high] if high > low else [low]


def write_curve(curve: Curve, directory: Path) -> list[Path]:
    """Writes ``curve.csv`` and, where matplotlib is installed, ``curve.svg``. Returns what was written.

    The figure shows costs as the summary does: as shares of ``Curve.unit``.
    """
    text = io.StringIO()
    rows = [asdict(point) for point in curve.points]
    writer = csv.DictWriter(text, list(CurvePoint.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "curve.csv", text.getvalue())
    written = [directory / "curve.csv"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return written
    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    sizes = [p.stored_bytes / 1e9 for p in curve.points]
    shares = [p.predicted_cost / curve.unit for p in curve.points]
    uniform = [p.uniform_cost / curve.unit for p in curve.points]
    axes.plot(sizes, shares, marker="o", label=f"allocated ({curve.method})")
    axes.plot(sizes, uniform, "--", color="gray", label="uniform widths, or two mixed at random")
    for point, size, share in zip(curve.points, sizes, shares, strict=True):
        if point.bits % 0.5 == 0:
            axes.annotate(f"{point.bits:g}", (size, share), textcoords="offset points", xytext=(4, 6))
    axes.set(
        xlabel="checkpoint in GB (numbers: budget in bits per expert weight)",
        ylabel="predicted cost (1: uniform at the smallest budget)",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(directory / "curve.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return [*written, directory / "curve.svg"]


def _scored_problem(work: WorkDir, structure: Structure, recipe: Recipe) -> Problem:
    """The allocation problem with the costs of all calibration sources. Token counts, which it does not need, are 0."""
    problem = shape_problem(structure, recipe)
    names = [layer_file(i) for i, _ in structure.moe_layers]
    measured = _complete(work, "sensitivity", names) if recipe.rescale else None
    judged = Costs(_complete(work, "scores-*", names), measured)
    costs = [layer_costs(judged, i, recipe.smoothing) for i, _ in structure.moe_layers]
    return replace(problem, costs=np.concatenate(costs))


def _complete(work: WorkDir, pattern: str, names: list[str]) -> Stage:
    """The stage around full precision that matches ``pattern`` and has all of ``names``."""
    for stage, inputs in work.finished(pattern, names):
        if not inputs.get("around"):
            return stage
    raise UserError(
        f"{work.path} holds no complete scores: go on with the same gemq quantize command and --resume, or make them "
        f"with gemq export {shlex.quote(str(work.path))} -o OUT --allocate global"
    )
