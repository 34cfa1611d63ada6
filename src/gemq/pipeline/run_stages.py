"""The stages of a job in order, and their result.

Calibration windows, candidates, sensitivity, scores, allocation, guard, reconstruction, distillation, save. Each stage
takes the results of earlier stages as arguments and keeps its own in the work directory, so that a job can be resumed,
and another budget computes only the stages that depend on it.

A new stage has a module ``*_stage.py``, with what it computes and what it costs. It is called here. Its inputs are in
``stage_settings``, and also become inputs of the stages that use its results. ``stage_costs`` counts its time and
memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemq.allocation.guard import soften, with_unsoftened_cost
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.checkpoint.format import PackedFormat
from gemq.models.byte_sizes import parameter_bytes, quantized_share
from gemq.models.replay import Replay
from gemq.pipeline.allocation_stage import ALLOCATE, Costs, make_problem, solve, with_all_widths
from gemq.pipeline.candidates_stage import CandidateFiles, count_candidate_fallbacks, run_candidates
from gemq.pipeline.card_files import curve_of_job, make_record, repeating_recipe
from gemq.pipeline.codes_stage import CodesChoice, run_codes
from gemq.pipeline.context import Job
from gemq.pipeline.guard_stage import guard_plans, run_guard
from gemq.pipeline.job_record import record_result
from gemq.pipeline.load_stage import run_load
from gemq.pipeline.preflight import check_allocation, expert_budget, fixed_bytes, read_allocation
from gemq.pipeline.reconstruction_stage import ReconstructedModel, assembled_layers, run_reconstruction
from gemq.pipeline.save_stage import SAVE, is_complete, make_packed_format, run_save
from gemq.pipeline.scores_stage import FULL_PRECISION, run_gradients, run_scores, stage_name
from gemq.pipeline.sensitivity_stage import run_sensitivity
from gemq.pipeline.stage_costs import JobStages, stage_rounds, stage_seconds
from gemq.pipeline.windows_stage import Calibration, begin_reading, run_windows
from gemq.planning.cost_model import Workload
from gemq.quant.widths import ExpertWidths, plain_widths
from gemq.recipe import Recipe
from gemq.runtime.files import check_free_space, write_text

OTHER_BUDGETS = (1.5, 2.5, 2.0, 3.0)
"""Budgets in bits that the summary suggests for another export, in order of preference."""

MIN_BUDGET_DISTANCE = 0.4
"""Bits between a job's own budget and the one that the summary suggests."""


@dataclass(frozen=True)
class Result:
    """What ``quantize`` and ``export`` did and wrote. They return it."""

    out: Path
    """Directory of the checkpoint."""
    work: Path
    """Work directory."""
    complete_before: bool
    """Whether an earlier run of this job had already written the output."""
    budget: str
    """The budget, such as ``2 bits``."""
    method: str
    """Method of the allocation, as in ``allocate``, or ``from a file``."""
    codes: CodesChoice
    """Codes of the experts, and why they are not trellis codes."""
    predicted_cost: float | None
    """Sum of the scores of the allocation. None for an allocation without scores."""
    allocation: list[list[ExpertWidths]]
    """Widths by layer and expert, of gate and up and of down. An empty list for a dense layer."""
    layer_bits: list[float]
    """Mean nominal bits per expert weight of each layer, 0 for a dense layer."""
    parameters: dict[str, int]
    """Number of parameters of the model by kind: ``experts``, ``attention``, ``shared``, ``dense``, ``router``, and
    ``other`` for embeddings, norms and head."""
    quantized_share: float
    """Share of the parameters that are quantized, from 0 to 1."""
    original_bytes: int
    """Bytes of the full-precision model's tensors."""
    stored_bytes: int
    """Bytes of the checkpoint's tensors."""
    expert_bits_nominal: float
    """Mean bits per expert weight, without scales and offsets."""
    expert_bits_stored: float
    """Mean bits per expert weight, with scales and offsets."""
    seq_len: int
    """Tokens per calibration window."""
    windows: dict[str, int]
    """Number of calibration windows by source."""
    fallbacks: dict[str, int]
    """How often something was not done in the usual way, by name."""
    expert_tokens: list[list[int]] = field(default_factory=list)
    """Calibration tokens of each expert, by layer. An empty list for a dense layer."""
    gains: dict[str, float] = field(default_factory=dict)
    """Errors on held-out windows before and after training: ``reconstruction_before`` and ``reconstruction_after``
    (mean relative error of layers' outputs), ``distillation_before`` and ``distillation_after`` (nats per token)."""
    calibration_rows: dict[str, Any] = field(default_factory=dict)
    """By source with rows: number of rows by column that the text is from, and of rows that were left out."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The guard's verdict on the allocation, or under ``skipped`` why it did not run."""
    spilled_bytes: dict[str, int] = field(default_factory=dict)
    """Most bytes of activations and packed layers that memory did not hold, by where they were: ``host memory`` or
    ``disk``."""
    work_bytes: int = 0
    """Bytes of the work directory."""
    other_bits: float | None = None
    """Another budget in bits that ``export`` takes. None if there is only one candidate width."""
    trust_remote_code: bool = False
    """Whether code that comes with the model was allowed to run."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """``seconds``, ``peak_gpu_bytes`` and ``peak_host_bytes`` of each stage of this run."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``gemq quantize --json`` writes them.

        ``allocation`` has one number for an expert whose matrices have the same width.
        """
        values = {**dataclasses.asdict(self), "allocation": plain_widths(self.allocation)}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


@dataclass(frozen=True)
class _Prepared:
    """What all stages after the candidates work on.

    Attributes:
        job: the job.
        stages: which of the optional stages run.
        replay: the full-precision model.
        stored_dtypes: the type in which each parameter is stored.
        calibration: the calibration windows.
        candidates: of all layers.
    """

    job: Job
    stages: JobStages
    replay: Replay
    stored_dtypes: dict[str, torch.dtype]
    calibration: Calibration
    candidates: CandidateFiles

    def problem(self, costs: Costs | None, leave_out: str | None = None) -> Problem:
        """The allocation problem. ``leave_out``: a calibration source that does not count."""
        windows = self.calibration.windows
        return make_problem(self.replay.structure, self.job.recipe, windows, self.candidates, costs, leave_out)

    def gradients_directory(self, costs: Costs | None) -> str | None:
        """Name of the directory with the gradients that reconstruction uses, of scores if there are any.

        None if nothing is reconstructed, or without gradients.
        """
        if not self.stages.reconstruct or not self.job.recipe.has_output_feedback:
            return None
        return costs.scores.directory.name if costs else stage_name(self.job, self.calibration.windows)

    def reconstruct(self, allocation: Allocation, costs: Costs | None) -> ReconstructedModel:
        """The model reconstructed at the widths of an allocation. Computes gradients if there are no scores."""
        job, windows = self.job, self.calibration.windows
        scores = None
        if self.gradients_directory(costs) is not None:
            scores = costs.scores if costs else run_gradients(job, self.replay, windows)
        return run_reconstruction(job, self.replay, self.stored_dtypes, windows, allocation, scores)


def run_stages(
    job: Job,
    stages: JobStages,
    out: Path,
    allocation_file: Path | None,
    key: str | None = None,
    verify: bool = True,
) -> Result:
    """Runs the stages of a job.

    Args:
        job: the job.
        stages: which of the optional stages run.
        out: directory of the checkpoint.
        allocation_file: with the widths of every expert, if they are given.
        key: under which the work directory records the result, so that ``--resume`` recognizes its output.
        verify: compare the replay with the model's own forward.
    """
    begin_reading(job)
    replay, stored_dtypes = run_load(job, verify)
    codes = run_codes(job, replay)
    structure, ranks, recipe = replay.structure, replay.ranks, job.recipe
    # The budget was checked with the types of the configuration. Files may hold wider ones.
    unquantized_bytes = fixed_bytes(replay.model, structure, recipe, stored_dtypes)
    check_allocation(structure, recipe, unquantized_bytes, allocation_file, stages.reconstruct)
    _set_expected_times(job, replay, stages)
    calibration = run_windows(job, replay, lambda windows: guard_plans(recipe, windows) if stages.guard else ())
    candidates = run_candidates(job, replay, calibration.windows)
    count_candidate_fallbacks(job, replay, candidates)
    prepared = _Prepared(job, stages, replay, stored_dtypes, calibration, candidates)
    costs = _compute_costs(prepared) if stages.scores else None
    problem = prepared.problem(costs)
    allocation, verdict = _run_allocation(prepared, problem, costs, unquantized_bytes, allocation_file)
    gradients = prepared.gradients_directory(costs)
    packed_format = make_packed_format(job, structure, calibration.windows, allocation, stages.reconstruct, gradients)
    if key is not None:
        ranks.run_on_first(lambda: record_result(job.work.path, key, packed_format.fingerprint))
    complete_before = ranks.run_on_first(lambda: is_complete(out, packed_format))
    result = Result(
        out=out,
        work=job.work.path,
        complete_before=complete_before,
        budget="of the file" if allocation_file else recipe.budget_text,
        method="from a file" if allocation_file else allocation.method,
        codes=codes,
        predicted_cost=allocation.predicted_cost if costs is not None else None,
        allocation=allocation.by_layer,
        layer_bits=list(allocation.layer_bits),
        parameters=structure.parameters,
        quantized_share=quantized_share(structure, recipe),
        original_bytes=parameter_bytes(replay.model, stored_dtypes),
        stored_bytes=unquantized_bytes + allocation.stored_bytes,
        expert_bits_nominal=allocation.nominal_bits,
        expert_bits_stored=allocation.stored_bits,
        seq_len=calibration.windows.seq_len,
        windows=calibration.windows.counts(),
        fallbacks=job.fallbacks,
        expert_tokens=_expert_tokens(problem),
        calibration_rows=calibration.rows,
        guard=verdict,
        other_bits=_other_bits(recipe, allocation.nominal_bits),
        trust_remote_code=job.source.trust_remote_code,
    )
    if not complete_before:
        ranks.run_on_first(lambda: check_free_space(out, result.stored_bytes))
        result = _run_output(prepared, allocation, problem, costs, packed_format, result)
    result = _with_costs(job, result)
    return dataclasses.replace(result, work_bytes=job.work.size())


def _with_costs(job: Job, result: Result) -> Result:
    """The result with what the stages so far took, and everything that was not done in the usual way."""
    job.count_accelerations()
    return dataclasses.replace(
        result,
        fallbacks=job.fallbacks,
        spilled_bytes={tier.value: count for tier, count in job.memory.spilled.items()},
        stages={name: dataclasses.asdict(cost) for name, cost in job.monitor.stages.items()},
    )


def _expert_tokens(problem: Problem) -> list[list[int]]:
    """Calibration tokens of each expert, by layer."""
    per_expert = problem.counts[:: problem.units_per_expert].tolist()
    counts, start = [], 0
    for rows in problem.by_layer:
        num_experts = (rows.stop - rows.start) // problem.units_per_expert
        counts.append(per_expert[start : start + num_experts])
        start += num_experts
    return counts


def _set_expected_times(job: Job, replay: Replay, stages: JobStages) -> None:
    """Sets the expected times of the stages for the progress bar, if one is shown."""
    if job.monitor.console is None:
        return
    dtype = replay.model.dtype
    memory = job.memory.on_device.limit - job.working_bytes
    workload = Workload(replay.structure, job.recipe, replay.model.config, job.seq_len, dtype, job.device, memory)
    job.monitor.expected = stage_seconds(workload, stages)
    job.monitor.rounds = stage_rounds(job.recipe)


def _compute_costs(prepared: _Prepared) -> Costs:
    """Scores and sensitivities.

    A progressive recipe reconstructs the model at each of its budgets but the last. The next scores are computed around
    that model.
    """
    job, replay, candidates = prepared.job, prepared.replay, prepared.candidates
    windows, recipe = prepared.calibration.windows, job.recipe
    sensitivity = run_sensitivity(job, replay, windows, candidates) if recipe.rescale else None
    scored_model = FULL_PRECISION
    earlier_budgets = recipe.progressive[:-1] if prepared.stages.reconstruct else ()
    for bits in earlier_budgets:
        costs = Costs(run_scores(job, replay, windows, candidates, scored_model), sensitivity)
        allocation = solve(prepared.problem(costs), Budget("bits", bits), recipe)
        model = prepared.reconstruct(allocation, costs)
        scored_model = model.scored(job, replay, allocation.by_layer)
    return Costs(run_scores(job, replay, windows, candidates, scored_model), sensitivity)


def _run_allocation(
    prepared: _Prepared,
    problem: Problem,
    costs: Costs | None,
    unquantized_bytes: int,
    allocation_file: Path | None,
) -> tuple[Allocation, dict[str, Any]]:
    """The widths of all experts, and the guard's verdict on them. Writes ``allocation.json``."""
    job, replay = prepared.job, prepared.replay
    verdict: dict[str, Any] = {"skipped": prepared.stages.guard_skipped}
    if allocation_file is not None:
        allocation = read_allocation(allocation_file, problem, job.recipe, prepared.stages.reconstruct)
    else:
        with job.monitor.stage(ALLOCATE, 1) as tick:
            budget = expert_budget(job.recipe, unquantized_bytes, problem)
            allocation = solve(problem, budget, job.recipe)
            tick()
        if prepared.stages.guard:
            allocation, verdict = run_guard(
                job,
                replay,
                prepared.calibration,
                prepared.candidates,
                problem,
                budget,
                allocation,
                lambda name: prepared.problem(costs, leave_out=name),
            )
        allocation = _refine(prepared, problem, budget, allocation, verdict)
    replay.ranks.run_on_first(lambda: write_text(job.work.path / "allocation.json", allocation.to_json()))
    return allocation, verdict


def _refine(
    prepared: _Prepared, problem: Problem, budget: Budget, allocation: Allocation, verdict: dict[str, Any]
) -> Allocation:
    """The allocation by all widths of a reconstructed model, where they are more than the candidates.

    The guard judged the allocation by candidate widths, which it can assemble. Its verdict holds for the finer widths,
    whose costs lie between.
    """
    recipe = prepared.job.recipe
    refined = with_all_widths(problem, recipe)
    if refined is problem or recipe.allocate != "global" or not prepared.stages.reconstruct:
        return allocation
    softening = verdict.get("m", 0.0)
    if softening is None:  # no allocation was better than uniform widths
        return allocate(refined, budget, "uniform", seed=recipe.seed)
    return with_unsoftened_cost(solve(soften(refined, softening), budget, recipe), refined)


def _run_output(
    prepared: _Prepared,
    allocation: Allocation,
    problem: Problem,
    costs: Costs | None,
    packed_format: PackedFormat,
    result: Result,
) -> Result:
    """Reconstructs the model, or assembles it from the candidates, and saves it.

    Args:
        prepared: what the stages work on.
        allocation: of the experts.
        problem: of the allocation.
        costs: in ``problem``; None if there are no scores.
        packed_format: of the checkpoint.
        result: everything that is known before.

    Returns:
        The result with what training gained.
    """
    job, replay, reconstruct = prepared.job, prepared.replay, prepared.stages.reconstruct
    if reconstruct:
        model = prepared.reconstruct(allocation, costs)
        layers, tuned, gains = model.layers(), model.tuned, model.gains
    else:
        layers, tuned, gains = assembled_layers(replay, prepared.candidates, allocation), {}, {}
    result = dataclasses.replace(result, gains=gains)

    def record() -> dict[str, Any]:
        curve = None
        if costs is not None:
            fixed = result.stored_bytes - allocation.stored_bytes
            curve = curve_of_job(problem, job.recipe, fixed, allocation.stored_bytes)
        facts = _with_costs(job, result).to_dict()
        facts["stages"].pop(SAVE, None)  # it has only begun
        return make_record(job, packed_format, facts, repeating_recipe(job, reconstruct), curve)

    run_save(job, replay, prepared.stored_dtypes, result.out, packed_format, layers, tuned, allocation, record)
    return result


def _other_bits(recipe: Recipe, bits: float) -> float | None:
    """A budget within the candidate widths that is clearly different from ``bits``; None if there is none."""
    low, high = recipe.candidate_widths[0].bits, recipe.candidate_widths[-1].bits
    for budget in (*OTHER_BUDGETS, low, high):
        if low <= budget <= high and abs(budget - bits) > MIN_BUDGET_DISTANCE:
            return budget
    return None
