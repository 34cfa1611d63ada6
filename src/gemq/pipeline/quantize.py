"""``quantize`` and ``export``: the stages in order, from a model to a checkpoint.

Windows, ladder, sensitivity, scores, allocation, guard, reconstruction or refinement, distillation, save. Each stage's
result stays in the work directory, so that a job goes on where it was stopped and another budget costs only the stages
that depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.checkpoint.format import PackedFormat, read_quantization_config
from gemq.checkpoint.outputs import check_apart, check_output, claimed, default_work, remove_stale_lock
from gemq.checkpoint.save import dense_state, model_card, write_checkpoint
from gemq.errors import UserError, shown
from gemq.layers.refinement import RefinedLayer, matrix_widths
from gemq.models.byte_sizes import linear_bytes, other_bytes, quantized_share, smaller_groups
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import Structure
from gemq.pipeline.context import Job, needs_texts
from gemq.pipeline.guard_stage import own_plans, run_guard
from gemq.pipeline.job_record import (
    JobRecord,
    check_own_output,
    check_same_recipe,
    check_texts,
    check_whole,
    known_files,
    record_job,
    record_result,
    recorded_job,
    result_key,
)
from gemq.pipeline.layer_stages import (
    FULL_PRECISION,
    Judged,
    assembled,
    layer_file,
    make_problem,
    run_ladder,
    run_scores,
)
from gemq.pipeline.preflight import check_allocation, check_job, expert_budget, read_allocation
from gemq.pipeline.reconstruction_stage import run_finish
from gemq.pipeline.records import digest
from gemq.pipeline.sensitivity_stage import run_sensitivity
from gemq.pipeline.workdir import Stage, WorkDir
from gemq.planning.cost_model import Workload
from gemq.quant.widths import ExpertWidths, nominal_bits, plain_widths
from gemq.recipe import Recipe
from gemq.runtime.files import check_free_space, write_text
from gemq.runtime.memory import Memory
from gemq.runtime.progress import Monitor, Tick
from gemq.runtime.ranks import start_ranks

SCORED = ("global", "layerwise")
"""Allocation methods that need scores."""


@dataclass
class Result:
    """What ``quantize`` and ``export`` give back; ``to_dict`` is the JSON of the command line."""

    out: Path
    work: Path
    complete_before: bool
    """The output was there already, made by this very job."""
    budget: str
    method: str
    predicted_cost: float | None
    allocation: list[list[ExpertWidths]]
    """By layer and expert the widths of gate and up, and of down; in JSON one number where they are the same."""
    layer_bits: list[float]
    """Mean nominal bits of each layer's expert weights, 0 for a dense layer."""
    parameters: dict[str, int]
    quantized_share: float
    original_bytes: int
    stored_bytes: int
    expert_bits_nominal: float
    expert_bits_stored: float
    window: int
    windows: dict[str, int]
    fallbacks: dict[str, int]
    gains: dict[str, float] = field(default_factory=dict)
    """Held-out errors before and after training: of layers' outputs (relative) and of distillation (nats)."""
    calibration_rows: dict[str, Any] = field(default_factory=dict)
    """By source with rows: the columns that its texts are from with their rows, and what was left out."""
    guard: dict[str, Any] = field(default_factory=dict)
    """The guard's verdict on the allocation, or why it was ``skipped``: see ``guard``."""
    waited: dict[str, int] = field(default_factory=dict)
    """Most bytes of activations and packed layers that lay in ``host memory`` and on ``disk`` for want of room."""
    work_bytes: int = 0
    other_bits: float | None = None
    """A budget that another ``export`` can have; None where the ladder has one width."""
    trust_remote_code: bool = False
    """Whether the model brings code, which each command has to allow."""
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = {**dataclasses.asdict(self), "allocation": plain_widths(self.allocation)}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def quantize(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    work: str | Path | None = None,
    resume: bool = False,
    allocation: str | Path | None = None,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Quantizes ``model`` (a local directory or a hub id) by ``recipe`` into the checkpoint directory ``out``.

    work:       directory of intermediate results, ``out`` with ``.work`` added by default
    resume:     go on with an interrupted job instead of refusing its work directory
    allocation: JSON file with the widths of every expert, instead of solving for them
    gpu_memory, host_memory: bytes that the job may hold at most, by default 90 % of what is free; no bound changes
                more of the result than how a GPU rounds what it computes more or less of at once
    Raises UserError when something cannot be done, before anything is lost or half written.
    """
    recipe = recipe or Recipe()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{shown(recipe)} is no recipe: give a gemq.Recipe, such as Recipe.from_yaml(file)")
    out = Path(out)
    work_path = Path(work) if work is not None else default_work(out)
    allocation = None if allocation is None else Path(allocation)
    ranks = start_ranks(device)

    def check() -> bool:
        check_apart(out, work_path, "name another --work")
        WorkDir.check(work_path, resume=resume)
        check_same_recipe(work_path, recipe)
        if finished := check_output(out, resume=resume):
            check_own_output(out, work_path, result_key(recipe, allocation))
        return finished

    finished = ranks.run_on_first(check)
    memory = Memory.bounded(ranks.device, gpu_memory, host_memory, work_path, ranks.local_count)
    source = Source.resolve(str(model), revision=revision, trust_remote_code=trust_remote_code)
    check_job(source, recipe, out, work_path, allocation, memory, new=not resume)
    if finished:
        ranks.run_on_first(lambda: check_whole(out, source))
    with ExitStack() as stack:
        if finished:
            ranks.run_on_first(lambda: remove_stale_lock(out))
        else:
            ranks.run_on_first(lambda: stack.enter_context(claimed(out)))
        stack.enter_context(memory.enforced())
        fingerprint, files = ranks.run_on_first(lambda: source.fingerprint(known_files(work_path)))
        directory = stack.enter_context(WorkDir(work_path, resume=resume, ranks=ranks))
        record = JobRecord.of(source, recipe, fingerprint, files)
        ranks.run_on_first(lambda: record_job(directory.path, record))
        job = Job(source, recipe, directory, memory, monitor or Monitor(), fingerprint, record.calibration)
        key = result_key(recipe, allocation)
        return _run(job, out, allocation, finish=recipe.refine, guarded=True, key=key)


def export(
    work: str | Path,
    *,
    out: str | Path,
    changes: dict[str, Any] | None = None,
    finish: bool = False,
    allocation: str | Path | None = None,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Another budget from the work directory of ``quantize``, in seconds: weights are picked from its ladder.

    changes: recipe keys of the budget and the allocation, such as ``{"bits": 1.5}`` or ``{"allocate": "uniform"}``
    finish:  refine at the new widths, as ``quantize`` does, rather than take the ladder's weights
    gpu_memory, host_memory: as for ``quantize``
    model:   where the full-precision model lies now, if it was moved; by default where ``quantize`` found it
    trust_remote_code: lets code of the model run; no work directory decides that
    """
    out = Path(out)
    allocation = None if allocation is None else Path(allocation)
    ranks = start_ranks(device)

    def check() -> None:
        check_output(out, resume=False)
        check_apart(out, Path(work), "name another output")

    ranks.run_on_first(check)
    with ExitStack() as stack:
        directory = stack.enter_context(WorkDir.existing(Path(work), ranks))
        place = None if model is None else str(model)
        source, recipe, record = recorded_job(directory.path, changes, place, trust_remote_code)
        memory = Memory.bounded(ranks.device, gpu_memory, host_memory, directory.path, ranks.local_count)
        texts = needs_texts(directory.path, guarded=not _why_unguarded(recipe, allocation, finish))
        if texts:
            check_texts(directory.path, recipe.calib, record)
        check_job(source, recipe, out, directory.path, allocation, memory, new=False, texts=texts)
        ranks.run_on_first(lambda: stack.enter_context(claimed(out)))
        fingerprint, _ = ranks.run_on_first(lambda: source.fingerprint(record.files))
        if fingerprint != record.fingerprint:
            raise UserError(f"{source.path} is not the model that {work} was made from: quantize it again")
        job = Job(source, recipe, directory, memory, monitor or Monitor(), fingerprint, record.calibration)
        stack.enter_context(memory.enforced())
        return _run(job, out, allocation, finish=finish, guarded=finish)


def _run(
    job: Job, out: Path, allocation_file: Path | None, finish: bool, guarded: bool, key: str | None = None
) -> Result:
    """The stages in order. ``key``: of the result in the work directory, so that ``--resume`` knows it again."""
    # A plain export does not verify: quantize did, before the work directory had a ladder.
    job.read_texts()
    replay, stored = job.load(verify=guarded)
    structure = replay.structure
    fixed_bytes = other_bytes(replay.model, structure, job.recipe, stored) + linear_bytes(structure, job.recipe)
    check_allocation(structure, job.recipe, fixed_bytes, allocation_file)  # files may hold wider types than configured
    if job.monitor.console is not None:
        dtype = replay.model.dtype
        free = job.memory.on_device.limit - job.working
        workload = Workload.of(structure, job.recipe, replay.model.config, job.window, dtype, job.device, free)
        job.monitor.expected, job.monitor.rounds = workload.seconds(job.device, dtype), workload.rounds
    unguarded = _why_unguarded(job.recipe, allocation_file, guarded)
    job.draw_windows(replay, lambda windows: () if unguarded else own_plans(job.recipe, windows))
    ladder = run_ladder(job, replay)
    _count_fallbacks(job, structure, ladder)
    judged = None
    if allocation_file is None and job.recipe.allocate in SCORED:
        judged = _judge(job, replay, stored, ladder, progressive=finish)
    problem = make_problem(job, structure, ladder, judged)
    if allocation_file is not None:
        chosen = read_allocation(allocation_file, problem)
    else:
        with job.monitor.stage("allocate", 1) as tick:
            budget = expert_budget(job.recipe, fixed_bytes, problem)
            chosen = _solve(job, problem, budget)
            tick()
    guard: dict[str, Any] = {"skipped": unguarded}
    if not unguarded:
        leave_out = lambda name: make_problem(job, structure, ladder, judged, name)
        chosen, guard = run_guard(job, replay, ladder, problem, budget, chosen, leave_out)
    ranks = job.work.ranks
    ranks.run_on_first(lambda: write_text(job.work.path / "allocation.json", chosen.to_json()))
    result = Result(
        out=out,
        work=job.work.path,
        complete_before=False,
        budget="of the file" if allocation_file else job.recipe.budget_text,
        method="from a file" if allocation_file else chosen.method,
        predicted_cost=chosen.predicted_cost if judged is not None else None,
        allocation=chosen.by_layer,
        layer_bits=list(chosen.layer_bits),
        parameters=structure.parameters,
        quantized_share=quantized_share(structure, job.recipe),
        original_bytes=sum(p.numel() * stored[name].itemsize for name, p in replay.model.named_parameters()),
        stored_bytes=fixed_bytes + chosen.stored_bytes,
        expert_bits_nominal=chosen.nominal_bits,
        expert_bits_stored=chosen.stored_bits,
        window=job.windows.window,
        windows=job.windows.counts(),
        fallbacks=job.fallbacks,
        calibration_rows=job.calibration_rows,
        guard=guard,
        other_bits=_other_bits(job.recipe, chosen.nominal_bits),
        trust_remote_code=job.source.trust_remote_code,
    )
    packed_format = _packed_format(job, structure, chosen.by_layer, finish)
    if key is not None:
        ranks.run_on_first(lambda: record_result(job.work.path, key, packed_format.fingerprint))
    if not ranks.run_on_first(lambda: _is_complete(out, packed_format)):
        ranks.run_on_first(lambda: check_free_space(out, result.stored_bytes))
        layers, tuned = assembled(job, structure, ladder, chosen), {}
        if finish:
            finished = run_finish(job, replay, stored, chosen)
            layers, tuned, result.gains = finished.layers(), finished.tuned, finished.gains
        with job.monitor.stage("save", len(structure.layers)) as tick:
            ranks.run_on_first(lambda: _save(job, replay, stored, packed_format, _counted(layers, tick), tuned, result))
    else:
        result.complete_before = True
    job.count_fallbacks()
    result.waited = {place.value: count for place, count in job.memory.spilled.items()}
    result.work_bytes = job.work.size()
    result.stages = {name: dataclasses.asdict(cost) for name, cost in job.monitor.stages.items()}
    return result


def _solve(job: Job, problem: Problem, budget: Budget) -> Allocation:
    return allocate(problem, budget, job.recipe.allocate, layer_rule=job.recipe.layer_rule, seed=job.recipe.seed)


def _judge(job: Job, replay: Replay, stored: dict[str, torch.dtype], ladder: Stage, progressive: bool) -> Judged:
    """What to allocate by. The scores of a progressive recipe are around its last step's model."""
    measured = run_sensitivity(job, replay, ladder) if job.recipe.rescale else None
    around = FULL_PRECISION
    for bits in job.recipe.progressive[:-1] if progressive else ():
        judged = Judged(run_scores(job, replay, ladder, around), measured)
        problem = make_problem(job, replay.structure, ladder, judged)
        chosen = _solve(job, problem, Budget("bits", bits))
        around = run_finish(job, replay, stored, chosen).around(job, replay, chosen.by_layer)
    return Judged(run_scores(job, replay, ladder, around), measured)


def _other_bits(recipe: Recipe, bits: float) -> float | None:
    """A budget within the ladder's widths, half a bit or more away from ``bits``; None if there is none."""
    low, high = nominal_bits(recipe.ladder_widths[0]), nominal_bits(recipe.ladder_widths[-1])
    budgets = (1.5, 2.5, 2.0, 3.0, low, high)
    return next((b for b in budgets if low <= b <= high and abs(b - bits) > 0.4), None)


# Before anything is computed


def _why_unguarded(recipe: Recipe, allocation_file: Path | None, guarded: bool) -> str:
    """Why the allocation is not judged; empty if it is."""
    if allocation_file is not None or recipe.allocate not in SCORED:
        return "it judges the allocations that scores make"
    if not recipe.guard:
        return "switched off in the recipe"
    return "" if guarded else "a plain export takes seconds; --finish runs it"


def _is_complete(out: Path, packed_format: PackedFormat) -> bool:
    """Whether this very result stands in ``out`` already. An output appears by one rename: it is never half there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_quantization_config(out).get("fingerprint")
    except UserError:
        found = None
    if found != packed_format.fingerprint:
        raise UserError(f"{out} exists and holds something else: name another output, or delete it first")
    return True


# Checkpoint


def _packed_format(job: Job, structure: Structure, widths: list[list[ExpertWidths]], finish: bool) -> PackedFormat:
    experts = {}
    for i, layer in structure.moe_layers:
        assert layer.experts is not None
        experts[layer.experts.path] = matrix_widths(layer, widths[i])
    bits = job.recipe.attention_bits
    linears = {x.path: bits for layer in structure.layers for x in layer.linears} if bits < 16 else {}
    made_from = job.distil_inputs() if finish else job.ladder_inputs()
    fingerprint = digest({**made_from, "allocation": widths, "refined": finish})
    return PackedFormat(experts, linears, job.recipe.group_size, fingerprint)


def _save(
    job: Job,
    replay: Replay,
    stored: dict[str, torch.dtype],
    packed_format: PackedFormat,
    layers: Iterator[dict[str, Tensor]],
    tuned: dict[str, Tensor],
    result: Result,
) -> None:
    def shards() -> Iterator[dict[str, Tensor]]:
        yield from layers
        state = {**replay.unpacked(packed_format.replaced_names()), **tuned}
        own = {name: tensor.to(stored.get(name, tensor.dtype)) for name, tensor in state.items()}
        yield dense_state(replay.model, packed_format, own)

    facts = (
        f"Experts: {result.expert_bits_nominal:.3f} bits per weight on average "
        f"({result.expert_bits_stored:.3f} stored, scales and offsets included), allocation: {result.method}. "
        f"Attention and other linears: {job.recipe.attention_bits} bits. "
        f"{result.quantized_share:.1%} of {replay.structure.total_parameters / 1e6:.1f} million parameters quantized."
    )
    config = job.source.config()
    config.architectures = config.architectures or [type(replay.model).__name__]  # vLLM chooses its class by it
    write_checkpoint(
        result.out,
        config=config,
        packed_format=packed_format,
        shards=shards(),
        source=job.source.path,
        generation_config=None,
        model_card=model_card(facts=facts),
    )


def _counted(layers: Iterator[RefinedLayer], tick: Tick) -> Iterator[dict[str, Tensor]]:
    for layer in layers:
        yield layer.tensors
        tick()


def _count_fallbacks(job: Job, structure: Structure, ladder: Stage) -> None:
    """Counts what was not done as asked: never silent."""
    none = few = retries = untrained = small = 0
    for i, layer in enumerate(structure.layers):
        counts, notes = (ladder.load_tensor(layer_file(i), key) for key in ("counts", "notes"))
        retries += int(notes[0])
        untrained += int(notes[1])
        small += int(notes[2:].sum())
        if layer.experts is not None:
            none += int((counts == 0).sum())
            few += int(((counts > 0) & (counts < layer.experts.matrices[0].columns)).sum())
    job.fallbacks.update(
        experts_without_tokens=none,
        experts_with_few_tokens=few,
        hessians_damped_more=retries,
        rungs_not_improved_by_training=untrained,
        matrices_in_smaller_groups=smaller_groups(structure, job.recipe.group_size),
        linears_not_quantized=len(structure.kept_linears),
        matrices_too_small_for_scales=small,
    )
