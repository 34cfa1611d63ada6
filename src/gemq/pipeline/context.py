"""What all stages of one job share: the source model, the recipe, the work directory, memory bounds and progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from gemq.calibration.activations import Activations
from gemq.calibration.sources import Streams
from gemq.calibration.windows import Windows
from gemq.models.replay import Replay
from gemq.models.source import Source, calibration_seq_len
from gemq.pipeline.workdir import WorkDir
from gemq.recipe import Recipe
from gemq.runtime.fallbacks import pop_fallbacks
from gemq.runtime.memory import MemoryBudget
from gemq.runtime.progress import Monitor


@dataclass
class Job:
    """One model, one recipe, one work directory, and what the stages share.

    Attributes:
        source: the full-precision model's files.
        recipe: what decides the bytes of the result.
        work: the work directory, locked by this job.
        memory: bounds of device and host memory.
        monitor: progress bars and the cost of each stage.
        fingerprint: digest of the model's files.
        calibration: digest of each calibration source.
        fallbacks: what was not done as requested, counted by name. The summary shows it.
        working_bytes: device memory that is reserved for the arithmetic of a stage, once the model is loaded.
        training_bytes: the part of it for the state of experts that are trained at the same time.
    """

    source: Source
    recipe: Recipe
    work: WorkDir
    memory: MemoryBudget
    monitor: Monitor
    fingerprint: str
    calibration: Sequence[str]
    fallbacks: dict[str, int] = field(default_factory=dict)
    working_bytes: int = 0
    training_bytes: int = 0

    @property
    def device(self) -> torch.device:
        """Where the job computes."""
        return self.memory.device

    @cached_property
    def seq_len(self) -> int:
        """Tokens per calibration window."""
        return calibration_seq_len(self.source.config(), self.recipe.seq_len)

    @cached_property
    def streams(self) -> Streams:
        """The tokens of the calibration sources."""
        recipe, config = self.recipe, self.source.config().get_text_config()
        return Streams(
            recipe.calibration,
            self.source.tokenizer,
            self.seq_len,
            recipe.num_windows,
            column=recipe.calibration_column,
            embeddings=getattr(config, "vocab_size", None),
        )

    def start_activations(self, replay: Replay, windows: Windows) -> Activations:
        """The activations of ``windows`` in front of the first layer."""
        return Activations.start(replay, windows, self.recipe.micro_batch_tokens, self.recipe.seed)

    def count_fallback(self, name: str, count: int = 1) -> None:
        """Adds to the fallbacks that the summary shows."""
        self.fallbacks[name] = self.fallbacks.get(name, 0) + count

    def count_accelerations(self) -> None:
        """Counts the accelerations that this process could not use so far."""
        for name, fallback in pop_fallbacks().items():
            self.count_fallback(name, fallback.count)
