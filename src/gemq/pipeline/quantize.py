"""``quantize`` and ``export``: from a model, or a work directory, to a checkpoint.

Both check everything that can be checked in advance, open the work directory and run the stages.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemq.checkpoint.outputs import (
    check_not_nested,
    check_output,
    default_work_directory,
    lock_output,
    remove_stale_lock,
)
from gemq.errors import UserError, short_repr
from gemq.models.source import Source
from gemq.pipeline.context import Job
from gemq.pipeline.job_record import (
    JobRecord,
    check_own_output,
    check_same_recipe,
    check_texts,
    check_whole,
    known_files,
    record_job,
    recorded_job,
    result_key,
)
from gemq.pipeline.preflight import check_job
from gemq.pipeline.run_stages import Result, run_stages
from gemq.pipeline.stages import JobStages
from gemq.pipeline.windows_stage import needs_texts
from gemq.pipeline.workdir import WorkDir
from gemq.recipe import Recipe
from gemq.runtime.memory import MemoryBudget
from gemq.runtime.progress import Monitor
from gemq.runtime.ranks import start_ranks

__all__ = ["Result", "export", "quantize"]


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
    """Quantizes a model into a packed checkpoint.

    Args:
        model: local directory or hub id.
        recipe: what decides the bytes of the result; by default the default recipe.
        out: directory of the checkpoint.
        work: directory of intermediate results, by default ``out`` with ``.work`` added.
        resume: continue an interrupted job instead of refusing its work directory.
        allocation: JSON file with the widths of every expert, instead of solving for them.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu_memory: bytes that the job may take on the GPU, by default 90 % of what is free. It can change the result
            only by how a GPU rounds products of different sizes.
        host_memory: the same for host memory.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow code of the model to run.
        monitor: shows progress and collects the costs of the stages.

    Raises:
        UserError: something cannot be done. Nothing is lost or half written then.
    """
    recipe = recipe or Recipe()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{short_repr(recipe)} is no recipe: give a gemq.Recipe, such as Recipe.from_yaml(file)")
    out = Path(out)
    work_path = Path(work) if work is not None else default_work_directory(out)
    allocation = None if allocation is None else Path(allocation)
    ranks = start_ranks(device)

    def check_directories() -> bool:
        check_not_nested(out, work_path, "name another --work")
        WorkDir.check(work_path, resume=resume)
        check_same_recipe(work_path, recipe)
        is_finished = check_output(out, resume=resume)
        if is_finished:
            check_own_output(out, work_path, result_key(recipe, allocation))
        return is_finished

    is_finished = ranks.run_on_first(check_directories)
    memory = MemoryBudget.bounded(ranks.device, gpu_memory, host_memory, work_path, ranks.local_count)
    source = Source.resolve(str(model), revision=revision, trust_remote_code=trust_remote_code)
    check_job(source, recipe, out, work_path, allocation, memory, new=not resume)
    if is_finished:
        ranks.run_on_first(lambda: check_whole(out, source))
    with ExitStack() as stack:
        if is_finished:
            ranks.run_on_first(lambda: remove_stale_lock(out))
        else:
            ranks.run_on_first(lambda: stack.enter_context(lock_output(out)))
        stack.enter_context(memory.enforced())
        fingerprint, files = ranks.run_on_first(lambda: source.fingerprint(known_files(work_path)))
        directory = stack.enter_context(WorkDir(work_path, resume=resume, ranks=ranks))
        record = JobRecord.of(source, recipe, fingerprint, files)
        ranks.run_on_first(lambda: record_job(directory.path, record))
        job = Job(source, recipe, directory, memory, monitor or Monitor(), fingerprint, record.calibration)
        stages = JobStages.of(recipe, allocation, reconstruct=recipe.reconstruct)
        return run_stages(job, stages, out, allocation, result_key(recipe, allocation))


def export(
    work: str | Path,
    *,
    out: str | Path,
    changes: dict[str, Any] | None = None,
    reconstruct: bool = False,
    allocation: str | Path | None = None,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> Result:
    """Makes a checkpoint with another budget from a work directory of ``quantize``, in seconds.

    Args:
        work: the work directory, whose candidates are assembled.
        out: directory of the checkpoint.
        changes: recipe keys of the budget and the allocation, such as ``{"bits": 1.5}`` or ``{"allocate": "uniform"}``.
        reconstruct: reconstruct the model at the new widths, as ``quantize`` does.
        allocation: JSON file with the widths of every expert, instead of solving for them.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu_memory: as for ``quantize``.
        host_memory: as for ``quantize``.
        model: where the full-precision model is now; by default where ``quantize`` read it.
        trust_remote_code: allow code of the model to run. What the work directory says does not count.
        monitor: shows progress and collects the costs of the stages.

    Raises:
        UserError: something cannot be done. Nothing is lost or half written then.
    """
    out = Path(out)
    allocation = None if allocation is None else Path(allocation)
    ranks = start_ranks(device)

    def check_directories() -> None:
        check_output(out, resume=False)
        check_not_nested(out, Path(work), "name another output")

    ranks.run_on_first(check_directories)
    with ExitStack() as stack:
        directory = stack.enter_context(WorkDir.existing(Path(work), ranks))
        model_place = None if model is None else str(model)
        source, recipe, record = recorded_job(directory.path, changes, model_place, trust_remote_code)
        memory = MemoryBudget.bounded(ranks.device, gpu_memory, host_memory, directory.path, ranks.local_count)
        stages = JobStages.of(recipe, allocation, reconstruct=reconstruct, plain_export=not reconstruct)
        texts = needs_texts(directory.path, guarded=stages.guard)
        if texts:
            check_texts(directory.path, recipe.calibration, record)
        check_job(source, recipe, out, directory.path, allocation, memory, new=False, texts=texts)
        ranks.run_on_first(lambda: stack.enter_context(lock_output(out)))
        fingerprint, _ = ranks.run_on_first(lambda: source.fingerprint(record.files))
        if fingerprint != record.fingerprint:
            raise UserError(f"{source.path} is not the model that {work} was made from: quantize it again")
        job = Job(source, recipe, directory, memory, monitor or Monitor(), fingerprint, record.calibration)
        stack.enter_context(memory.enforced())
        # A plain export does not verify the replay: quantize did, before the work directory had candidates.
        return run_stages(job, stages, out, allocation, verify=reconstruct)
