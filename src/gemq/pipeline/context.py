"""A job: one model, one recipe, one work directory, and what its stages share.

Holds the loaded model, the calibration windows, and what each stage's results are a function of (their fingerprint).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.calibration.packed_generator import copy_bytes, packed_copy, widest_copy
from gemq.calibration.self_generation import (
    OF_THE_SOURCE,
    Plan,
    added_to,
    batch_size,
    cache_bytes,
    generate_windows,
    side_by_side,
)
from gemq.calibration.sources import SELF, Streams, calibration_windows, host_bytes
from gemq.calibration.windows import Windows
from gemq.checkpoint.format import FORMAT_VERSION
from gemq.layers.quantizer import Quantizer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.training import Training
from gemq.models.calls import one_line_errors
from gemq.models.layer_cache import Residency
from gemq.models.replay import Replay
from gemq.models.source import Source, calibration_window, pick_dtype
from gemq.models.structure import find_structure
from gemq.pipeline.workdir import Stage, WorkDir
from gemq.planning.memory_model import Footprint, held_bytes, staging_bytes
from gemq.quant.widths import ExpertWidths, Width, width_name
from gemq.recipe import Recipe
from gemq.runtime.fallbacks import take as take_fallbacks
from gemq.runtime.memory import Memory
from gemq.runtime.progress import Monitor, Tick

WINDOWS_STAGE, GUARD_WINDOWS_STAGE = "windows", "guard-windows"
WINDOWS_FILE, NOTES_FILE = "windows.safetensors", "notes.json"
"""What every stage of windows names its files."""

ROWS_FILE = "rows.json"
"""What was read of calibration sources that have rows, by name."""

BESIDE_FILE = "beside.safetensors"
"""What was written along with the calibration windows, in the same batches."""


class Writer:
    """Writes windows of ``window`` tokens as a model would: the model itself, or a packed copy of it.

    notes: windows that went without the chat template, and those that a copy wrote
    """

    def __init__(self, job: Job, replay: Replay, tick: Tick):
        self.tokenizer = job.source.tokenizer
        self.notes = {"chat_template_failures": 0, "windows_launched_by_steps": 0}
        self._job, self._replay, self._tick = job, replay, tick
        self._open = ExitStack()
        self._model: Any = None
        self._width: Width | None = None
        config = replay.model.config.get_text_config()
        self._batch = batch_size(config, job.window)
        self._each = cache_bytes(config, job.window, replay.model.dtype.itemsize)

    def write(self, *plans: Plan) -> list[Tensor]:
        """Of each plan int64 [count, window], on the CPU."""
        count = sum(plan.count for plan in plans)
        batch = min(self._batch, max(1, count))
        if self._model is None:
            self._model = self._open.enter_context(self._writing(batch * self._each))
        wanted = None
        if self._width is None and self._replay.device.type == "cuda" and self._replay.residency is not None:
            most = self._replay.residency.room_beside_all() // self._each
            rows = side_by_side(count, self._batch, most)
            wanted = min(own for _, (own,) in self._replay.ranks.all_gather_tensors([], [rows]))
        elif self._width is not None:  # as many side by side as there is room for beside the copy
            held = copy_bytes(self._replay.structure, self._width, self._outside)
            room = max(1, (self._replay.memory.on_device.limit - held) // self._each)
            wanted = self._replay.ranks.run_on_first(lambda: min(batch, room))
            note = f"windows_written_by_a_packed_copy_at_{width_name(self._width)}_bits"
            self.notes[note] = self.notes.get(note, 0) + count
        made = generate_windows(
            self._model,
            self.tokenizer,
            *plans,
            window=self._job.window,
            batch=wanted,
            progress=self._tick,
            ranks=self._replay.ranks,
        )
        self.notes["chat_template_failures"] += made.chat_fallbacks
        self.notes["windows_launched_by_steps"] += made.launched
        return made.tokens

    def close(self) -> None:
        """Lets go of the model that wrote."""
        self._model = None
        self._open.close()

    @property
    def _outside(self) -> int:
        return self._replay.residency.outside_bytes if self._replay.residency else 0

    def _writing(self, caches: int) -> AbstractContextManager[Any]:
        """The model that writes, with ``caches`` bytes of keys and values at a time."""
        replay, memory = self._replay, self._replay.memory

        def width() -> Width | None:
            given = self._job.recipe.self_width
            room = max(0, caches - self._job.working)  # nothing else computes meanwhile
            if given is not None or replay.residency is None or replay.residency.fits(room):
                return given
            beside = min(caches, FEWEST_ROWS * self._each)
            return widest_copy(replay.structure, self._outside, beside + self._outside, memory)

        self._width = replay.ranks.run_on_first(width)
        if self._width is None:
            return replay.whole()
        directory = self._job.work.path / f"{COPY}-{replay.ranks.rank}"
        return packed_copy(replay, self._job.source, self._width, directory)


COPY = "copy-that-writes"
"""Directory of the packed copy while it is there; each rank has its own."""

FEWEST_ROWS = 8
"""Windows that a packed copy can at least write side by side: fewer would take hours."""


@dataclass
class Job:
    """What the stages of one job share.

    fallbacks: what was not done as asked, counted by name; shown in the summary
    working:   bytes on the device that a stage may compute with
    train_room: of them, for the state of experts that are trained together
    written_beside: windows that were written along with calibration's, see ``draw_windows``
    calibration_rows: by name of the source what was read of rows (``Rows.to_dict``)
    calibration: fingerprint of each calibration source
    """

    source: Source
    recipe: Recipe
    work: WorkDir
    memory: Memory
    monitor: Monitor
    fingerprint: str
    calibration: Sequence[str]
    fallbacks: dict[str, int] = field(default_factory=dict)
    working: int = 0
    train_room: int = 0
    written_beside: list[Tensor] = field(default_factory=list)
    calibration_rows: dict[str, Any] = field(default_factory=dict)

    def load(self, verify: bool = True) -> tuple[Replay, dict[str, torch.dtype]]:
        """The full-precision model, ready to be replayed, and the type in which each parameter is stored.

        verify: compare the replay with the model's own forward, for which one layer of each kind is read
        """
        with self.monitor.stage("load", 1) as tick:
            dtype = pick_dtype(self.recipe.dtype, self.device)
            model, reader = self.source.open(self.device, dtype)
            self.fallbacks["matrices_left_out"] = len(self.source.left_out)
            structure = find_structure(model)
            residency = Residency(model, structure, reader, self.memory, dtype)
            if self.device.type == "cuda":
                self.memory.host.take(staging_bytes(model, structure))
            texts = host_bytes(self.recipe.calib)
            self.memory.host.take(texts)
            footprint = Footprint(structure, self.recipe, model.config, dtype, self.device)
            held = held_bytes(model, structure, dtype) + (0 if self.device.type == "cuda" else texts)
            self.train_room = footprint.train_room(self.memory.on_device.limit - held)
            self.working = footprint.working(self.train_room)
            room = self.memory.room(self.working)
            assert room, "bounds are checked before"
            with one_line_errors(
                f"{self.source.path} cannot be run", "correct its config.json, or copy the model again"
            ):
                replay = Replay(model, structure, residency, self.work.ranks)
                if verify:
                    vocabulary = model.config.get_text_config().vocab_size
                    replay.verify(torch.arange(16, device=self.device).unsqueeze(0) % vocabulary)
            tick()
        return replay, reader.types

    def count_fallbacks(self) -> None:
        """Adds the accelerations that were left out so far."""
        for name, found in take_fallbacks().items():
            self.fallbacks[name] = self.fallbacks.get(name, 0) + found.count

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @cached_property
    def window(self) -> int:
        """Tokens per calibration window."""
        return calibration_window(self.source.config(), self.recipe.window)

    @cached_property
    def streams(self) -> Streams:
        """What the calibration sources hold."""
        recipe, config = self.recipe, self.source.config().get_text_config()
        return Streams(
            recipe.calib,
            self.source.tokenizer,
            self.window,
            recipe.windows,
            column=recipe.calib_column,
            embeddings=getattr(config, "vocab_size", None),
        )

    def read_texts(self) -> None:
        """Begins to read the calibration sources, if windows are still to be drawn: a model can load meanwhile."""
        if not has_windows(self.work.path, WINDOWS_STAGE):
            self.streams.begin()

    def draw_windows(self, replay: Replay, beside: Callable[[Windows], Sequence[Plan]] = lambda _: ()) -> Windows:
        """The calibration windows, drawn or generated once. ``replay`` writes those of ``self``.

        beside: further windows, by those drawn, to be written along with the ones that an effort adds: in the same
                batches, before the model that writes is put away. They wait in ``written_beside``
        """
        recipe = self.recipe
        stage = self.work.stage(WINDOWS_STAGE, self._window_inputs())

        def draw(writer: Writer) -> tuple[Windows, dict[str, int]]:
            windows = calibration_windows(
                self.streams,
                seed=recipe.seed,
                generate=lambda count: writer.write(Plan(count, recipe.seed, OF_THE_SOURCE))[0],
            )
            missing = recipe.windows - len(windows)
            rows = self.streams.rows()
            stage.save_json(ROWS_FILE, {name: read.to_dict() for name, read in rows.items()})
            added = -(-max(0, recipe.total_tokens - windows.tokens.numel()) // self.window)
            if added:
                # another seed: these are windows beside those that the source ``self`` may have given
                plans = [Plan(added, recipe.seed + 1, added_to(windows))]
                if windows.names != (SELF,):  # else what goes beside them would depend on those added as well
                    plans += beside(windows)
                own, *further = writer.write(*plans)
                windows = windows.extended(SELF, own)
                if further:
                    stage.save_tensors(BESIDE_FILE, {f"{place}": tokens for place, tokens in enumerate(further)})
            return windows, {
                "calibration_windows_missing": missing,
                "calibration_rows_empty": sum(read.empty for read in rows.values()),
                "calibration_rows_without_template": sum(read.untemplated for read in rows.values()),
            }

        self.windows = self.windows_stage(stage, "calibration windows", recipe.windows, replay, draw)
        self.calibration_rows = stage.load_json(ROWS_FILE) if stage.has(ROWS_FILE) else {}
        if stage.has(BESIDE_FILE):
            found = stage.load_tensors(BESIDE_FILE)
            self.written_beside = [found[f"{place}"] for place in range(len(found))]
        return self.windows

    def windows_stage(
        self,
        stage: Stage,
        title: str,
        steps: int,
        replay: Replay,
        draw: Callable[[Writer], tuple[Windows, dict[str, int]]],
    ) -> Windows:
        """Windows that ``draw`` gives, drawn once; what it counts beside them is added to the fallbacks."""
        if not (stage.has(WINDOWS_FILE) and stage.has(NOTES_FILE)):
            with self.monitor.stage(title, steps) as tick:
                writer = Writer(self, replay, tick)
                with closing(writer):
                    windows, notes = draw(writer)
                stage.save_json(NOTES_FILE, {**notes, **writer.notes})
                stage.save_tensors(WINDOWS_FILE, windows.to_tensors(), windows.about())
        for note, count in stage.load_json(NOTES_FILE).items():
            self.fallbacks[note] = self.fallbacks.get(note, 0) + count
        return Windows.from_tensors(stage.load_tensors(WINDOWS_FILE), stage.about(WINDOWS_FILE))

    def start_activations(self, replay: Replay, windows: Windows | None = None) -> Activations:
        """``windows``, by default all of calibration's, in front of the first layer."""
        windows = self.windows if windows is None else windows
        return Activations.start(replay, windows, self.recipe.batch_tokens, self.recipe.seed)

    @property
    def quantizer(self) -> Quantizer:
        r = self.recipe
        return Quantizer(r.quantizer, r.group_size, r.damping, r.hessian_shrink)

    def scheme(self, widths: Sequence[ExpertWidths]) -> QuantizationScheme:
        """The scheme of a layer whose experts have these widths."""
        return QuantizationScheme(widths, self.recipe.attention_bits, self.recipe.group_size)

    def training(self, epochs: int, rate_codes: float, tuned: bool = True) -> Training | None:
        """How ``epochs`` epochs train, None when there are none. ``tuned`` False leaves routers and norms alone."""
        r = self.recipe
        if epochs == 0:
            return None

        def launched() -> None:
            note = "training_launched_by_steps"
            self.fallbacks[note] = self.fallbacks.get(note, 0) + 1

        rates = (rate_codes, r.rate_grids, r.rate_tuned * tuned)
        return Training(epochs, *rates, r.held_out, r.seed, launched, self.train_room)

    # Fingerprints: each names only what the stage's own results depend on

    def _window_inputs(self) -> dict[str, Any]:
        r = self.recipe
        return {
            "model": self.fingerprint,
            "calibration": list(self.calibration),
            "windows": r.windows,
            "window": self.window,
            "total_tokens": r.total_tokens,
            "seed": r.seed,
            **({"self_width": r.self_width} if r.self_width is not None else {}),
            **({"calib_column": r.calib_column} if r.calib_column is not None else {}),
        }

    def guard_inputs(self) -> dict[str, Any]:
        """What the guard's windows depend on: they are those that calibration did not take."""
        return {**self._window_inputs(), "taken": self.windows.digest()[:16]}

    def _quantizer_inputs(self) -> dict[str, Any]:
        """What codes depend on beside the widths."""
        r = self.recipe
        keys = ("group_size", "attention_bits", "quantizer", "damping", "hessian_shrink", "batch_tokens", "seed")
        return {
            "format": FORMAT_VERSION,
            "model": self.fingerprint,
            "calibration": self.windows.digest()[:16],
            "dtype": str(pick_dtype(r.dtype, self.device)),
            **{key: getattr(r, key) for key in keys},
        }

    def ladder_inputs(self) -> dict[str, Any]:
        training = self._training_inputs(self.recipe.ladder_epochs)
        return {**self._quantizer_inputs(), "widths": list(self.recipe.ladder_widths), **training}

    def refine_inputs(self) -> dict[str, Any]:
        return {**self._quantizer_inputs(), **self._training_inputs(self.recipe.layer_epochs)}

    def distil_inputs(self) -> dict[str, Any]:
        r = self.recipe
        how = {"distil_loss": r.distil_loss, "distil_sets": list(r.distil_sets)} if r.distil_epochs else {}
        return {**self.refine_inputs(), **how, "distil_epochs": self._training_inputs(r.distil_epochs)}

    def _training_inputs(self, epochs: int | None) -> dict[str, Any]:
        if not epochs:
            return {"epochs": 0}
        keys = ("rate_ladder", "rate_codes", "rate_grids", "rate_tuned", "held_out")
        return {"epochs": epochs, **{key: getattr(self.recipe, key) for key in keys}}

    def score_inputs(self) -> dict[str, Any]:
        keys = ("score_form", "score_labels", "score_weights", "score_tokens", "allocate_by", "seed")
        return {**self.ladder_inputs(), **{key: getattr(self.recipe, key) for key in keys}}

    def sensitivity_inputs(self) -> dict[str, Any]:
        return {**self.ladder_inputs(), "score_weights": self.recipe.score_weights}


def has_windows(work: Path, stage: str) -> bool:
    """Whether a stage of windows is complete in a work directory, so that nobody needs the texts for it."""
    return all((work / stage / name).is_file() for name in (WINDOWS_FILE, NOTES_FILE))


def needs_texts(work: Path, guarded: bool) -> bool:
    """Whether calibration texts are still to be read. ``guarded``: the guard has windows of its own."""
    return not has_windows(work, WINDOWS_STAGE) or (guarded and not has_windows(work, GUARD_WINDOWS_STAGE))
