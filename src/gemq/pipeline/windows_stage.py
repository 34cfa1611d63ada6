"""Calibration and guard windows: drawn from texts, or written by the model itself, once per work directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gemq.calibration.packed_generator import generator_bytes, packed_generator_copy, widest_generator
from gemq.calibration.self_generation import (
    SELF_SOURCE_OPENINGS,
    WindowPlan,
    added_window_openings,
    batch_size,
    generate_windows,
    gpu_batch_size,
)
from gemq.calibration.sources import SELF, calibration_windows
from gemq.calibration.windows import Windows
from gemq.models.cache_size import estimated_cache
from gemq.models.replay import Replay
from gemq.pipeline.context import Job
from gemq.pipeline.stage_settings import window_inputs
from gemq.pipeline.workdir import Stage
from gemq.planning.cost_model import Work, Workload
from gemq.quant.widths import Width
from gemq.runtime.integers import ceil_div
from gemq.runtime.progress import Tick

CALIBRATION_WINDOWS = "calibration windows"
"""Name of the stage in progress bars and in the summary."""

WINDOWS_STAGE, GUARD_WINDOWS_STAGE = "windows", "guard-windows"
"""Directories of the two stages that draw windows."""

WINDOWS_FILE, NOTES_FILE = "windows.safetensors", "notes.json"
"""Files of every stage that draws windows."""

ROWS_FILE = "rows.json"
"""What was read of calibration sources that have rows, by name."""

GUARD_TOKENS_FILE = "guard-tokens.safetensors"
"""The guard's windows that the model wrote in the batches of the calibration windows."""

GENERATOR_DIRECTORY = "generator-copy"
"""Directory of the generator copy while it exists. Each rank has its own."""

MIN_GENERATOR_ROWS = 8
"""Fewest windows that a generator copy must be able to write at the same time. With fewer it would take hours."""

GRAPH_CALLS = 0.2
"""Cost of an operation that a CUDA graph replays, as a share of launching it (lab log, entry 24)."""


class WindowWriter:
    """Writes windows by sampling from the full-precision model, or from a packed generator copy of it.

    Attributes:
        notes: fallbacks to count: windows without the chat template, and windows that a generator copy wrote.
    """

    def __init__(self, job: Job, replay: Replay, tick: Tick):
        """The generator is loaded when the first window is written.

        Args:
            job: gives the tokenizer, the length of a window, and where a generator copy is stored.
            replay: the full-precision model.
            tick: called with the number of tokens written, and of all tokens.
        """
        self.notes = {"chat_template_failures": 0, "windows_launched_by_steps": 0}
        self._job, self._replay, self._tick = job, replay, tick
        self._exit_stack = ExitStack()
        self._model: Any = None
        self._width: Width | None = None
        config = replay.model.config.get_text_config()
        self._batch_size = batch_size(config, job.seq_len)
        self._cache_bytes = estimated_cache(config, replay.model.dtype).sequence_bytes(job.seq_len)

    def write(self, *plans: WindowPlan) -> list[Tensor]:
        """Writes the windows of each plan: int64 [count, window] on the CPU."""
        count = sum(plan.count for plan in plans)
        if self._model is None:
            rows = min(self._batch_size, max(1, count))
            self._model = self._exit_stack.enter_context(self._open_generator(rows * self._cache_bytes))
        generated = generate_windows(
            self._model,
            self._job.source.tokenizer,
            *plans,
            seq_len=self._job.seq_len,
            batch=self._rows_per_batch(count),
            progress=self._tick,
            ranks=self._replay.ranks,
        )
        if self._width is not None:
            note = f"windows_written_by_a_packed_copy_at_{self._width}_bits"
            self.notes[note] = self.notes.get(note, 0) + count
        self.notes["chat_template_failures"] += generated.chat_fallbacks
        self.notes["windows_launched_by_steps"] += generated.eager_windows
        return generated.tokens

    def close(self) -> None:
        """Frees the generator."""
        self._model = None
        self._exit_stack.close()

    def _rows_per_batch(self, count: int) -> int | None:
        """Windows to write at the same time, the same on all ranks. None leaves it to ``generate_windows``."""
        replay = self._replay
        if self._width is not None:  # as many as fit next to the copy
            model_bytes = generator_bytes(replay.structure, self._width, self._bytes_outside_layers)
            rows_that_fit = max(1, (replay.memory.on_device.limit - model_bytes) // self._cache_bytes)
            return replay.ranks.run_on_first(lambda: min(self._batch_size, max(1, count), rows_that_fit))
        if replay.device.type == "cuda" and replay.layer_cache is not None:
            rows_that_fit = replay.layer_cache.free_bytes_with_all_layers() // self._cache_bytes
            rows = gpu_batch_size(count, self._batch_size, rows_that_fit)
            return min(rank_rows for _, (rank_rows,) in replay.ranks.all_gather_tensors([], [rows]))
        return None

    @property
    def _bytes_outside_layers(self) -> int:
        """Bytes of embeddings, norms and head."""
        return self._replay.layer_cache.outside_bytes if self._replay.layer_cache else 0

    def _open_generator(self, caches: int) -> AbstractContextManager[Any]:
        """The model that writes. ``caches``: bytes of keys and values of one batch."""
        replay = self._replay
        self._width = replay.ranks.run_on_first(lambda: self._choose_width(caches))
        if self._width is None:
            return replay.full_model()
        directory = self._job.work.path / f"{GENERATOR_DIRECTORY}-{replay.ranks.rank}"
        return packed_generator_copy(replay, self._job.source, self._width, directory)

    def _choose_width(self, caches: int) -> Width | None:
        """The width of the generator copy; None when the model itself writes."""
        replay, requested = self._replay, self._job.recipe.generator_width
        extra_caches = max(0, caches - self._job.working_bytes)  # no stage computes at the same time
        if requested is not None or replay.layer_cache is None or replay.layer_cache.all_layers_fit(extra_caches):
            return requested
        min_caches = min(caches, MIN_GENERATOR_ROWS * self._cache_bytes)
        outside = self._bytes_outside_layers
        return widest_generator(replay.structure, outside, min_caches + outside, replay.memory)


@dataclass(frozen=True)
class Calibration:
    """The calibration windows, and what was read and written along with them.

    Attributes:
        windows: the calibration windows.
        guard_tokens: windows that the model wrote for the guard in the same batches, int64 [n, window] for each of the
            guard's plans. Empty when it wrote none.
        rows: what was read of sources that have rows, by name of the source (``RowStats.to_dict``).
    """

    windows: Windows
    guard_tokens: Sequence[Tensor]
    rows: dict[str, Any]


def run_windows(
    job: Job, replay: Replay, guard_plans: Callable[[Windows], Sequence[WindowPlan]] = lambda windows: ()
) -> Calibration:
    """Draws or generates the calibration windows.

    Args:
        job: the job.
        replay: the model, which writes the windows of the source ``self``.
        guard_plans: from the windows of the sources, the guard's windows that the model is going to write. They share
            batches with the windows that the effort adds, so that the generator is loaded only once.
    """
    stage = job.work.stage(WINDOWS_STAGE, window_inputs(job))
    draw = lambda writer: _draw_calibration(job, stage, writer, guard_plans)
    windows = draw_once(job, replay, stage, CALIBRATION_WINDOWS, job.recipe.num_windows, draw)
    guard_tokens: list[Tensor] = []
    if stage.has(GUARD_TOKENS_FILE):
        tokens = stage.load_tensors(GUARD_TOKENS_FILE)
        guard_tokens = [tokens[f"{index}"] for index in range(len(tokens))]
    rows = stage.load_json(ROWS_FILE) if stage.has(ROWS_FILE) else {}
    return Calibration(windows, guard_tokens, rows)


def _draw_calibration(
    job: Job, stage: Stage, writer: WindowWriter, guard_plans: Callable[[Windows], Sequence[WindowPlan]]
) -> tuple[Windows, dict[str, int]]:
    """The calibration windows, and fallbacks to count. Saves the rows that were read, and the guard's tokens."""
    recipe = job.recipe
    windows = calibration_windows(
        job.streams,
        seed=recipe.seed,
        generate=lambda count: writer.write(WindowPlan(count, recipe.seed, SELF_SOURCE_OPENINGS))[0],
    )
    rows = job.streams.row_stats()
    notes = {
        "calibration_windows_missing": recipe.num_windows - len(windows),
        "calibration_rows_empty": sum(read.empty for read in rows.values()),
        "calibration_rows_without_template": sum(read.untemplated for read in rows.values()),
    }
    stage.save_json(ROWS_FILE, {name: read.to_dict() for name, read in rows.items()})
    missing_tokens = max(0, recipe.total_tokens - windows.tokens.numel())
    added = ceil_div(missing_tokens, job.seq_len)
    if added:
        # Another seed than the source ``self`` has, or these windows would repeat the source's.
        plans = [WindowPlan(added, recipe.seed + 1, added_window_openings(windows))]
        if windows.names != (SELF,):  # otherwise the guard's plans depend on the added windows as well
            plans += guard_plans(windows)
        added_tokens, *guard_tokens = writer.write(*plans)
        windows = windows.extended(SELF, added_tokens)
        if guard_tokens:
            stage.save_tensors(GUARD_TOKENS_FILE, {f"{index}": tokens for index, tokens in enumerate(guard_tokens)})
    return windows, notes


def draw_once(
    job: Job,
    replay: Replay,
    stage: Stage,
    title: str,
    steps: int,
    draw: Callable[[WindowWriter], tuple[Windows, dict[str, int]]],
) -> Windows:
    """The windows of a stage, drawn unless the stage has them already.

    Args:
        job: the job. The notes of the stage are added to its fallbacks.
        replay: the model, which writes windows.
        stage: where windows and notes are stored.
        title: of the progress bar.
        steps: of the progress bar.
        draw: returns the windows, and fallbacks to count.
    """
    if not (stage.has(WINDOWS_FILE) and stage.has(NOTES_FILE)):
        with job.monitor.stage(title, steps) as tick:
            writer = WindowWriter(job, replay, tick)
            with closing(writer):
                windows, notes = draw(writer)
            stage.save_json(NOTES_FILE, {**notes, **writer.notes})
            stage.save_tensors(WINDOWS_FILE, windows.to_tensors(), windows.metadata())
    for note, count in stage.load_json(NOTES_FILE).items():
        job.count_fallback(note, count)
    return Windows.from_tensors(stage.load_tensors(WINDOWS_FILE), stage.about(WINDOWS_FILE))


def begin_reading(job: Job) -> None:
    """Starts to read the calibration sources in the background, unless the windows are drawn already."""
    if not has_windows(job.work.path, WINDOWS_STAGE):
        job.streams.start_reading()


def has_windows(work: Path, stage: str) -> bool:
    """Whether a stage of a work directory has its windows, so that the texts are not needed for it."""
    return all((work / stage / name).is_file() for name in (WINDOWS_FILE, NOTES_FILE))


def needs_texts(work: Path, guarded: bool) -> bool:
    """Whether calibration texts are still to be read. ``guarded``: the guard runs, which has windows of its own."""
    if not has_windows(work, WINDOWS_STAGE):
        return True
    return guarded and not has_windows(work, GUARD_WINDOWS_STAGE)


def windows_work(workload: Workload, count: int) -> Work:
    """Work of writing ``count`` windows. A step computes one token of each window in a batch, and reads all weights."""
    if not count:
        return Work()
    config, seq_len = workload.text_config, workload.seq_len
    batch = batch_size(config, seq_len)
    weight_bytes = workload.structure.total_parameters * workload.dtype.itemsize
    on_gpu = workload.device.type == "cuda"
    if on_gpu:
        free_bytes = workload.memory - weight_bytes
        cache_bytes = estimated_cache(config, workload.dtype).sequence_bytes(seq_len)
        batch = gpu_batch_size(count, batch, free_bytes // cache_bytes)
    tokens, steps = count * seq_len, seq_len * ceil_div(count, batch)
    work = workload.head(tokens) + Work(bytes=steps * weight_bytes * workload.costs.weight_reads)
    for layer in workload.structure.layers:
        work += workload.forward(layer, tokens, steps)
    return dataclasses.replace(work, calls=work.calls * GRAPH_CALLS) if on_gpu else work
