"""A job: one model, one recipe, one work directory, and what its stages share.

Holds the loaded model, the calibration windows, and what each stage's results are a function of (their fingerprint).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.calibrate import Activations
from gemq.data.selfgen import OF_THE_SOURCE, Openings, added_to, generate_windows
from gemq.data.sources import SELF, calibration_windows
from gemq.data.windows import Windows
from gemq.files import replacing
from gemq.ladder import Quantizer
from gemq.models.source import Source, calibration_window, pick_dtype
from gemq.models.stream import Replay
from gemq.models.structure import find_structure
from gemq.progress import Monitor
from gemq.recipe import Recipe
from gemq.reconstruct import Training
from gemq.workdir import WorkDir


@dataclass
class Job:
    """What the stages of one job share.

    fallbacks: what was not done as asked, counted by name; shown in the summary
    """

    source: Source
    recipe: Recipe
    work: WorkDir
    device: torch.device
    monitor: Monitor
    fingerprint: str
    fallbacks: dict[str, int] = field(default_factory=dict)

    def load(self) -> tuple[Replay, dict[str, torch.dtype]]:
        """The full-precision model, ready to be replayed, and the type in which each parameter is stored."""
        with self.monitor.stage("load", 1) as tick:
            model, stored = self.source.load(self.device, pick_dtype(self.recipe.dtype, self.device))
            self.fallbacks["matrices_left_out"] = len(self.source.left_out)
            replay = Replay(model, find_structure(model))
            vocabulary = model.config.get_text_config().vocab_size
            replay.verify(torch.arange(16, device=self.device).unsqueeze(0) % vocabulary)
            tick()
        return replay, stored

    @cached_property
    def window(self) -> int:
        """Tokens per calibration window."""
        return calibration_window(self.source.config(), self.recipe.window)

    def draw_windows(self, replay: Replay) -> Windows:
        """The calibration windows, drawn or generated once. ``replay`` writes those of ``self``."""
        recipe = self.recipe
        stage = self.work.stage("windows", self._window_inputs())
        path = stage.directory / "windows.safetensors"
        if not stage.has(path.name):
            notes = {"chat_template_failures": 0}
            with self.monitor.stage("calibration windows", recipe.windows) as tick:
                tokenizer = self.source.tokenizer()

                def generate(count: int, seed: int, openings: Openings = OF_THE_SOURCE) -> Tensor:
                    model, window = replay.model, self.window
                    made = generate_windows(
                        model, tokenizer, count=count, window=window, seed=seed, openings=openings, progress=tick
                    )
                    notes["chat_template_failures"] += made.chat_fallbacks
                    return made.tokens

                windows = calibration_windows(
                    recipe.calib,
                    tokenizer=tokenizer,
                    window=self.window,
                    count=recipe.windows,
                    seed=recipe.seed,
                    generate=lambda count: generate(count, recipe.seed),
                )
                missing = recipe.windows - len(windows)
                added = -(-max(0, recipe.total_tokens - windows.tokens.numel()) // self.window)
                if added:
                    # another seed: these are windows beside those that the source ``self`` may have given
                    more = generate(added, recipe.seed + 1, added_to(windows.tokens, windows.names == (SELF,)))
                    windows = windows.extended(SELF, more)
            notes["calibration_windows_missing"] = missing
            stage.save_json("notes.json", notes)
            with replacing(path) as temporary:
                windows.save(temporary)
        windows = Windows.load(path)
        self.fallbacks.update(stage.load_json("notes.json"))
        self.windows = windows
        return windows

    def start_activations(self, replay: Replay) -> Activations:
        return Activations.start(replay, self.windows, self.recipe.batch_tokens, self.recipe.seed)

    @property
    def quantizer(self) -> Quantizer:
        r = self.recipe
        return Quantizer(r.quantizer, r.group_size, r.damping, r.hessian_shrink)

    def training(self, epochs: int, rate_codes: float) -> Training | None:
        """How ``epochs`` epochs train, None when there are none."""
        r = self.recipe
        if epochs == 0:
            return None
        return Training(epochs, rate_codes, r.rate_grids, r.rate_tuned, r.held_out, r.seed)

    # Fingerprints: each names only what the stage's own results depend on

    def _window_inputs(self) -> dict[str, Any]:
        r = self.recipe
        return {
            "model": self.fingerprint,
            "calibration": [source_digest(s) for s in r.calib],
            "windows": r.windows,
            "window": self.window,
            "total_tokens": r.total_tokens,
            "seed": r.seed,
        }

    def guard_inputs(self) -> dict[str, Any]:
        """What the guard's windows depend on: they are those that calibration did not take."""
        return {**self._window_inputs(), "taken": self.windows.digest()[:16]}

    def _quantizer_inputs(self) -> dict[str, Any]:
        """What codes depend on beside the widths."""
        r = self.recipe
        keys = ("group_size", "attention_bits", "quantizer", "damping", "hessian_shrink", "batch_tokens", "seed")
        return {
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
        keys = ("score_form", "score_labels", "score_weights", "seed")
        return {**self.ladder_inputs(), **{key: getattr(self.recipe, key) for key in keys}}


def source_digest(source: str) -> str:
    """A calibration source as a fingerprint sees it: a file by its bytes, anything else by its name."""
    path = Path(source)
    if not path.is_file():
        return source
    with path.open("rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
