"""The size curve: bytes and predicted cost of every budget within the candidate widths, from a work directory's scores.

Each point solves one allocation. Neither weights nor candidates are read. The scores are those around the
full-precision model, as in an ``export`` without ``reconstruct``.
"""

from __future__ import annotations

import csv
import io
import itertools
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemq.allocation.problem import Budget, Problem, allocate, smallest_budget
from gemq.errors import UserError
from gemq.models.byte_sizes import parameter_bytes
from gemq.models.source import Source, configured_types
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.allocation_stage import Costs, layer_costs, shape_problem
from gemq.pipeline.job_record import check_config, recorded_job
from gemq.pipeline.preflight import fixed_bytes
from gemq.pipeline.scores_stage import SCORES
from gemq.pipeline.sensitivity_stage import SENSITIVITY
from gemq.pipeline.workdir import Stage, WorkDir, layer_file
from gemq.recipe import Recipe
from gemq.reporting.svg import CHART_HEIGHT, CHART_WIDTH, size_curve_chart, standalone
from gemq.runtime.files import write_text

STEP_BITS = 0.125
"""Distance between two budgets of a curve."""


@dataclass(frozen=True)
class CurvePoint:
    """A budget, and the size and predicted cost of its allocation.

    Attributes:
        bits: the budget, in nominal bits per expert weight.
        nominal_bits: mean bits per expert weight of the allocation, without scales and offsets.
        stored_bits: mean bits per expert weight of the allocation, with scales and offsets.
        expert_bytes: bytes of all experts.
        stored_bytes: bytes of all the checkpoint's tensors.
        predicted_cost: sum of the scores of the allocation.
        uniform_cost: mean cost of the best random mixture of two candidate widths at this budget.
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
    """Bytes and predicted cost of every budget. ``size_curve`` returns it.

    Attributes:
        model: directory of the full-precision model.
        method: method of the allocations.
        original_bytes: bytes of the full-precision model's tensors.
        points: the points in ascending order of budget.
    """

    model: str
    method: str
    original_bytes: int
    points: tuple[CurvePoint, ...]

    @property
    def unit(self) -> float:
        """The cost of uniform widths at the smallest budget. The summary and the figure show costs relative to it."""
        return self.points[0].uniform_cost or 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``gemq export --curve --json`` writes them."""
        return asdict(self)


def size_curve(
    work: str | Path,
    method: str | None = None,
    step: float = STEP_BITS,
    *,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Curve:
    """Predict size and cost of every budget from a work directory of ``quantize``, in seconds.

    Args:
        work: the work directory.
        method: ``global`` or ``layerwise``. None: the recipe's method if it is one of them, otherwise ``global``.
        step: nominal bits between two budgets.
        model: where the full-precision model is now. None: where ``quantize`` read it.
        trust_remote_code: allow Python code that comes with the model to run.

    Returns:
        A point for each budget from the lowest to the highest candidate width. Its costs are those of
        ``allocation_problem``.

    Raises:
        UserError: the directory holds no complete scores, or is damaged.
    """
    source, recipe, skeleton, structure, problem = _open_scored_job(work, model, trust_remote_code)
    method = method or (recipe.allocate if recipe.allocate == "layerwise" else "global")
    if method not in ("global", "layerwise"):
        raise UserError(f"--curve shows allocations by scores, not {method}: choose global or layerwise")
    stored_dtypes = configured_types(skeleton)
    fixed = fixed_bytes(skeleton, structure, recipe, stored_dtypes)
    points = curve_points(problem, recipe, fixed, method, step)
    return Curve(str(source.path), method, parameter_bytes(skeleton, stored_dtypes), tuple(points))


def curve_points(problem: Problem, recipe: Recipe, fixed: int, method: str, step: float) -> list[CurvePoint]:
    """The points of a size curve.

    Args:
        problem: with the costs.
        recipe: its layer rule and its seed are used.
        fixed: bytes of everything but the experts.
        method: ``global`` or ``layerwise``.
        step: nominal bits between two budgets.
    """
    smallest = smallest_budget(problem, "bits", method, layer_rule=recipe.layer_rule).value
    points = []
    for bits in budgets(problem.widths[0].bits, problem.widths[-1].bits, step):
        if bits < smallest:
            continue
        allocation = allocate(problem, Budget("bits", bits), method, layer_rule=recipe.layer_rule, seed=recipe.seed)
        point = CurvePoint(
            bits=bits,
            nominal_bits=allocation.nominal_bits,
            stored_bits=allocation.stored_bits,
            expert_bytes=allocation.stored_bytes,
            stored_bytes=fixed + allocation.stored_bytes,
            predicted_cost=allocation.predicted_cost,
            uniform_cost=uniform_cost(problem, bits),
        )
        points.append(point)
    return points


def allocation_problem(
    work: str | Path, *, model: str | Path | None = None, trust_remote_code: bool = False
) -> Problem:
    """Read the allocation problem of a work directory of ``quantize``: the cost of every expert matrix at each width.

    Replace its ``costs`` to allocate by other scores (``dataclasses.replace``) and solve it with ``allocate``. Save
    ``Allocation.to_json`` to a file, and ``export(work, out=out, allocation=file)`` writes the checkpoint.

    Args:
        work: the work directory.
        model: where the full-precision model is now. None: where ``quantize`` read it.
        trust_remote_code: allow Python code that comes with the model to run.

    Returns:
        The problem. ``costs`` are the scores around the full-precision model, over all calibration sources, after
        usage smoothing and ``rescale``. With ``rescale``, which is the default, they are in nats of KL per token: those
        of a layer at a width sum to the KL that was measured there. ``counts`` are the tokens that were scored.

    Raises:
        UserError: the directory holds no complete scores, or is damaged.
    """
    return _open_scored_job(work, model, trust_remote_code).problem


class _ScoredJob(NamedTuple):
    """A job whose scores are complete."""

    source: Source
    recipe: Recipe
    skeleton: Any
    structure: Structure
    problem: Problem


def _open_scored_job(work: str | Path, model: str | Path | None, trust_remote_code: bool) -> _ScoredJob:
    """Reads the scores of a work directory. See ``allocation_problem``."""
    model = None if model is None else str(model)
    with WorkDir.existing(Path(work)) as directory:
        source, recipe, record = recorded_job(directory, model=model, trust_remote_code=trust_remote_code)
        check_config(source, record)
        skeleton = source.skeleton()
        structure = find_structure(skeleton)
        return _ScoredJob(source, recipe, skeleton, structure, _scored_problem(directory, structure, recipe))


def uniform_cost(problem: Problem, bits: float) -> float:
    """The lowest cost of uniform widths, or of two widths mixed at random, with at most ``bits`` nominal bits.

    The cost of a mixture is the mean over all draws. So the cost never rises as budgets grow.
    """
    total_costs = problem.costs.sum(axis=0).tolist()
    by_width = [(width.bits, cost) for width, cost in zip(problem.widths, total_costs, strict=True)]
    narrower = [(width, cost) for width, cost in by_width if width <= bits]
    wider = [(width, cost) for width, cost in by_width if width > bits]
    costs = [cost for _, cost in narrower]
    for (low, low_cost), (high, high_cost) in itertools.product(narrower, wider):
        costs.append(low_cost + (high_cost - low_cost) * (bits - low) / (high - low))
    return min(costs)


def budgets(low: float, high: float, step: float) -> list[float]:
    """``low``, the multiples of ``step`` between ``low`` and ``high``, and ``high``."""
    if high <= low:
        return [low]
    multiples = np.arange(np.floor(low / step) + 1, np.ceil(high / step)) * step
    return [low, *multiples.tolist(), high]


def write_curve(curve: Curve, directory: Path) -> list[Path]:
    """Writes ``curve.csv`` and ``curve.svg``. Returns their paths.

    Like the summary, the figure shows costs relative to ``Curve.unit``.
    """
    table_path, figure_path = directory / "curve.csv", directory / "curve.svg"
    rows = [asdict(point) for point in curve.points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(CurvePoint.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table_path, text.getvalue())
    chart = standalone(size_curve_chart(rows, curve.unit), CHART_WIDTH, CHART_HEIGHT, "Predicted cost by size")
    write_text(figure_path, chart)
    return [table_path, figure_path]


def _scored_problem(work: WorkDir, structure: Structure, recipe: Recipe) -> Problem:
    """The allocation problem with the costs and the scored tokens of all calibration sources."""
    problem = shape_problem(structure, recipe)
    names = [layer_file(i) for i, _ in structure.moe_layers]
    sensitivity = _finished_stage(work, SENSITIVITY, names) if recipe.rescale else None
    costs = Costs(_finished_stage(work, f"{SCORES}-*", names), sensitivity)
    cost_tables = [layer_costs(costs, i, recipe.smoothing) for i, _ in structure.moe_layers]
    counts = [costs.scores.load_tensor(layer_file(i), "tokens").sum(0).numpy() for i, _ in structure.moe_layers]
    return replace(
        problem, costs=np.concatenate(cost_tables), counts=np.concatenate(counts).repeat(problem.units_per_expert)
    )


def _finished_stage(work: WorkDir, pattern: str, names: list[str]) -> Stage:
    """The finished stage around the full-precision model.

    Args:
        work: the work directory.
        pattern: of the stage's directory.
        names: files that it must have.

    Raises:
        UserError: there is none.
    """
    for stage, inputs in work.finished(pattern, names):
        if not inputs.get("around"):
            return stage
    raise UserError(
        f"{work.path} holds no complete scores: repeat the gemq quantize command with --resume, or make them "
        f"with gemq export {shlex.quote(str(work.path))} -o OUT --allocate global"
    )
