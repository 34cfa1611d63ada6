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
from gemq.pipeline.stage_costs import JobStages
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
    """Quantize a model into a packed checkpoint.

    The work directory keeps every matrix at every width. ``export`` makes other checkpoints from it in seconds.

    Args:
        model: local directory or hub id of the full-precision model.
        recipe: the settings that decide the bytes of the result. None: ``Recipe()``.
        out: directory of the checkpoint, which must not exist or be empty.
        work: directory of intermediate results. None: next to ``out``, with ``.work`` added to its name.
        resume: continue an interrupted job, whose work directory is rejected otherwise.
        allocation: JSON file with the widths of every expert, see ``Allocation.to_json``. None: solve for them.
        device: ``auto``, ``cpu`` or ``cuda``. ``auto`` is the GPU if there is one.
        gpu_memory: bytes that the job may take on the GPU. None: 90 % of the free memory. It can change the result
            only by how a GPU rounds products of different sizes.
        host_memory: bytes that the job may take on the host. None: 90 % of the free memory.
        revision: branch, tag or commit on the hub. None: the default branch.
        trust_remote_code: allow Python code that comes with the model to run.
        monitor: shows progress and collects seconds and memory of the stages. None: nothing is shown.

    Returns:
        What was written: the widths of all experts, sizes, and seconds and memory of each stage.

    Raises:
        UserError: the job cannot be done. Most causes are found before anything is computed. Finished stages stay in
            the work directory, and ``out`` is never half written.
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
    check_job(source, recipe, out, work_path, allocation, memory, new=not resume, reconstruct=recipe.reconstruct)
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
    """Make a checkpoint with other widths from a work directory of ``quantize``.

    By default the candidates are assembled, which takes seconds: nothing is trained, and no guard runs. Stages that
    the work directory lacks are computed.

    Args:
        work: the work directory.
        out: directory of the checkpoint, which must not exist or be empty.
        changes: recipe keys of budget and allocation with new values, such as ``{"bits": 1.5}`` or
            ``{"allocate": "uniform"}``. None: the recipe of ``quantize``.
        reconstruct: run the guard, reconstruction and distillation at the new widths, which takes as long as in
            ``quantize``.
        allocation: JSON file with the widths of every expert, see ``Allocation.to_json``. None: solve for them.
        device: as for ``quantize``.
        gpu_memory: as for ``quantize``.
        host_memory: as for ``quantize``.
        model: where the full-precision model is now. None: where ``quantize`` read it.
        trust_remote_code: allow Python code that comes with the model to run. ``quantize`` does not decide this for
            ``export``.
        monitor: as for ``quantize``.

    Returns:
        As for ``quantize``.

    Raises:
        UserError: the checkpoint cannot be made. ``out`` is never half written.
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
        source, recipe, record = recorded_job(directory, changes, model_place, trust_remote_code)
        memory = MemoryBudget.bounded(ranks.device, gpu_memory, host_memory, directory.path, ranks.local_count)
        stages = JobStages.of(recipe, allocation, reconstruct=reconstruct, plain_export=not reconstruct)
        texts = needs_texts(directory.path, guarded=stages.guard)
        if texts:
            check_texts(directory.path, recipe.calibration, record)
        check_job(
            source, recipe, out, directory.path, allocation, memory, new=False, reconstruct=reconstruct, texts=texts
        )
        ranks.run_on_first(lambda: stack.enter_context(lock_output(out)))
        fingerprint, _ = ranks.run_on_first(lambda: source.fingerprint(record.files))
        if fingerprint != record.fingerprint:
            raise UserError(f"{source.path} is not the model that {work} was made from: quantize it again")
        job = Job(source, recipe, directory, memory, monitor or Monitor(), fingerprint, record.calibration)
        stack.enter_context(memory.enforced())
        # A plain export does not verify the replay: quantize did, before the work directory had candidates.
        return run_stages(job, stages, out, allocation, verify=reconstruct)
