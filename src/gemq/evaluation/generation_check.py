"""The generation check: what a quantized model and the full-precision model write after the same prompts.

KL and perplexity are measured on text that people wrote. A model at low widths may follow such text well and still fall
into repetition as soon as it reads what it wrote itself. So each model continues prompts from the texts of the
evaluation, and the KL between both is also measured along the quantized model's texts.

The quantized model writes first. The reference then runs over these texts in the same pass as over the windows, layer
by layer, so that their KL is known even if memory does not hold the reference. Only to write texts must all of its
layers be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.windows import Windows
from gemq.decoding.decoder import LENGTH_MULTIPLE
from gemq.errors import UserError
from gemq.evaluation.continuations import MODES, Continuation, Prompts, WrittenTexts, choose_prompts, write_texts
from gemq.evaluation.model_files import ModelFiles
from gemq.evaluation.predictions import Predictions
from gemq.evaluation.scoring import window_kl
from gemq.models.cache_size import estimated_cache
from gemq.models.source import max_seq_len
from gemq.runtime.memory import MemoryBudget, gigabytes
from gemq.runtime.progress import Monitor, Tick

NUM_PROMPTS = 32
PROMPT_TOKENS = 64

NEW_TOKENS = {"cuda": 512, "cpu": 128}
"""Default length of a continuation, by type of device. A CPU takes seconds for a step of a large model."""

SEED = 0
"""Of the sampled texts."""

MIN_ROWS = 4
"""Fewest texts that memory must hold in parallel. With fewer the check would take hours."""


@dataclass
class GenerationCheck:
    """The check of one model, with or without a reference. Call ``write``, then ``measure``, then ``values``.

    Attributes:
        subject: the model to evaluate
        reference: the full-precision model, if there is one
        prompts: that both continue
        new_tokens: upper bound for the tokens of a continuation
        fallbacks: what was not done in the usual way, a line each
    """

    subject: ModelFiles
    reference: ModelFiles | None
    prompts: Prompts
    new_tokens: int
    fallbacks: list[str]
    _texts: dict[str, WrittenTexts] = field(default_factory=dict)
    """By ``model`` and ``reference``."""
    _kl: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    """Mean KL along the texts of each mode, and its standard error."""

    @classmethod
    def plan(
        cls,
        subject: ModelFiles,
        reference: ModelFiles | None,
        windows: Windows,
        device: torch.device,
        max_new_tokens: int | None,
    ) -> GenerationCheck:
        """Chooses prompts from ``windows`` and the length of the texts.

        Args:
            max_new_tokens: upper bound for the tokens of a continuation; None: ``NEW_TOKENS``

        Raises:
            UserError: the model does not support texts of this length
        """
        longest = max_seq_len(subject.config)
        length = min(PROMPT_TOKENS, windows.seq_len, max(1, longest // 2))
        prompts = choose_prompts(windows, subject.source.tokenizer, NUM_PROMPTS, length, subject.embeddings)
        fallbacks: list[str] = []
        new_tokens = _new_tokens(max_new_tokens, device, prompts.longest, longest, fallbacks)
        if prompts.has_unusable_template:
            fallbacks.append(
                f"{len(prompts.prompts)} prompts are without the chat template, which could not be applied"
            )
        return cls(subject, reference, prompts, new_tokens, fallbacks)

    @property
    def seq_len(self) -> int:
        """Tokens of the longest prompt and its continuation."""
        return self.prompts.longest + self.new_tokens

    @property
    def num_texts(self) -> int:
        """Texts that each model writes."""
        return len(MODES) * len(self.prompts.prompts)

    def write(self, memory: MemoryBudget, monitor: Monitor) -> None:
        """Lets both models write, as far as memory holds them. Loads and frees one after the other."""
        self._write(self.subject, "model", "texts", memory, monitor)
        if self.reference is not None and "model" in self._texts:
            self._write(self.reference, "reference", "reference texts", memory, monitor)

    def _write(self, files: ModelFiles, role: str, title: str, memory: MemoryBudget, monitor: Monitor) -> None:
        """Lets one model write. ``title``: of the stage in the progress display."""
        prompt_tokens = self.num_texts * self.prompts.longest
        working_bytes = files.working_bytes(prompt_tokens, self.prompts.longest, memory.device)
        cache_len = math.ceil(self.seq_len / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        bytes_per_text = estimated_cache(files.config.get_text_config(), files.dtype).sequence_bytes(cache_len)
        free_bytes = memory.on_device.available - files.complete_bytes - working_bytes
        max_rows = min(self.num_texts, free_bytes // bytes_per_text)
        min_rows = min(self.num_texts, MIN_ROWS)
        if max_rows < min_rows:
            required_bytes = files.complete_bytes + working_bytes + min_rows * bytes_per_text
            self.fallbacks.append(
                f"{files.name} wrote no texts: this takes {gigabytes(required_bytes)}, with all of its layers in "
                f"memory, and {memory.flag} is {gigabytes(memory.on_device.limit)}"
            )
            return
        reserved_bytes = working_bytes + max_rows * bytes_per_text
        is_reserved = memory.try_reserve(reserved_bytes)
        assert is_reserved, "compared with what is available"
        with (
            files.complete_model(memory, monitor) as model,
            monitor.stage(title, self.num_texts * self.seq_len) as tick,
        ):
            texts = write_texts(
                model,
                self.subject.source.tokenizer,
                self.prompts.prompts,
                new_tokens=self.new_tokens,
                seed=SEED,
                max_rows=max_rows,
                progress=tick,
            )
            del model
        memory.on_device.free(reserved_bytes)
        self._texts[role] = texts
        if texts.eager_reason:
            self.fallbacks.append(
                f"{self.num_texts} texts of {files.name} were written without a CUDA graph, which model or memory did "
                f"not allow ({texts.eager_reason})"
            )

    def batches(self, max_tokens: int) -> list[Tensor]:
        """Returns the texts whose KL is to be measured, with their prompts: int64 [B, S].

        All have the same length. What follows the end of a text has no effect on it.

        Args:
            max_tokens: upper bound for the tokens of a batch. A batch has at least one text
        """
        if self.reference is None or "model" not in self._texts:
            return []
        tokens = torch.zeros(self.num_texts, self.seq_len, dtype=torch.int64)
        for row, (start, continuation) in enumerate(self._rows()):
            prompt = self.prompts.prompts[row % len(self.prompts.prompts)]
            tokens[row, :start] = torch.tensor(prompt.tokens)
            tokens[row, start : start + len(continuation.tokens)] = torch.tensor(continuation.tokens)
        return list(tokens.split(self.batch_rows(max_tokens)))

    def batch_rows(self, max_tokens: int) -> int:
        """Returns the texts of a batch of at most ``max_tokens`` tokens, at least one."""
        return max(1, min(self.num_texts, max_tokens // self.seq_len))

    def _rows(self) -> list[tuple[int, Continuation]]:
        """Returns the model's texts in the order of ``batches``, each with the length of its prompt."""
        rows = []
        for mode in MODES:
            continuations = self._texts["model"].by_mode[mode]
            for prompt, continuation in zip(self.prompts.prompts, continuations, strict=True):
                rows.append((len(prompt.tokens), continuation))
        return rows

    def measure(self, subject: Predictions, reference: Predictions, indices: range, tick: Tick) -> None:
        """Measures the KL along the model's texts, in nats per token of the continuations.

        Args:
            subject: predictions of the model
            reference: predictions of the full-precision model
            indices: of ``batches`` among the batches of the predictions
            tick: called after each text
        """
        rows = self._rows()
        kl_sums: list[Tensor] = []
        counts: list[int] = []
        for index in indices:
            logits, _ = subject.predict(index)
            reference_logits, _ = reference.predict(index)
            for text_logits, text_reference in zip(logits, reference_logits, strict=True):
                start, continuation = rows[len(counts)]
                predicting = slice(start - 1, start - 1 + len(continuation.tokens))
                kl_sums.append(window_kl(text_logits, text_reference, predicting).double().sum())
                counts.append(len(continuation.tokens))
                tick()
        num_prompts = len(self.prompts.prompts)
        for position, mode in enumerate(MODES):
            mode_rows = slice(position * num_prompts, (position + 1) * num_prompts)
            self._kl[mode] = _ratio_and_stderr(torch.stack(kl_sums[mode_rows]), torch.tensor(counts[mode_rows]))

    def values(self) -> dict[str, Any]:
        """Returns the results, as ``evaluate_paths`` documents them under ``generation``."""
        figures: dict[str, Any] = {
            "prompts": len(self.prompts.prompts),
            "prompts_in_chat_template": self.prompts.num_templated,
            "max_new_tokens": self.new_tokens,
            "seed": SEED,
        }
        for role, written in self._texts.items():
            figures[role] = {mode: _figures(texts) for mode, texts in written.by_mode.items()}
        for mode, (kl, error) in self._kl.items():
            figures["model"][mode] |= {"mean_kl": kl, "mean_kl_stderr": error}
        figures["texts"] = self._prompt_values() if self._texts else []
        return figures

    def _prompt_values(self) -> list[dict[str, Any]]:
        """Returns each prompt with what the models wrote after it."""
        tokenizer = self.subject.source.tokenizer
        values: list[dict[str, Any]] = []
        for index, prompt in enumerate(self.prompts.prompts):
            row: dict[str, Any] = {"source": prompt.source, "prompt": tokenizer.decode(prompt.text_tokens)}
            for role, written in self._texts.items():
                row[role] = {mode: _text_values(written.by_mode[mode][index], tokenizer) for mode in MODES}
            values.append(row)
        return values


def _new_tokens(
    requested: int | None, device: torch.device, prompt_tokens: int, longest: int, fallbacks: list[str]
) -> int:
    """Returns the upper bound for the tokens of a continuation.

    Args:
        requested: by the user; None: ``NEW_TOKENS``, or what the model takes
        prompt_tokens: of the longest prompt
        longest: tokens of the longest text that the model takes
        fallbacks: receives a line if the default is shorter than on a GPU

    Raises:
        UserError: the model does not take texts of this length
    """
    most_tokens = longest - prompt_tokens
    if most_tokens < 1:
        raise UserError(f"prompts have {prompt_tokens} tokens and the model takes {longest}: leave out --generate")
    if requested is not None:
        if requested > most_tokens:
            raise UserError(
                f"--max-new-tokens {requested} is too many after prompts of {prompt_tokens} tokens, since the model "
                f"takes {longest}: give at most {most_tokens}"
            )
        return requested
    default = NEW_TOKENS[device.type]
    new_tokens = min(default, most_tokens)
    if new_tokens < max(NEW_TOKENS.values()):
        reason = "on a CPU" if new_tokens == default else f"since the model takes {longest}"
        fallbacks.append(
            f"continuations have at most {new_tokens} tokens {reason}, not {max(NEW_TOKENS.values())}: loops that take "
            "longer are missed (--max-new-tokens sets another limit)"
        )
    return new_tokens


def _figures(texts: Sequence[Continuation]) -> dict[str, Any]:
    """Returns the figures of a model's texts of one mode."""
    rates = [text.repetition_rate for text in texts]
    lengths = [len(text.text_tokens) for text in texts if text.is_ended]
    num_loops = sum(text.loop_period is not None for text in texts)
    return {
        "repetition_rate": _mean([rate for rate in rates if rate is not None]),
        "loops": num_loops,
        "loop_share": num_loops / len(texts),
        "ended": len(lengths),
        "ended_share": len(lengths) / len(texts),
        "ended_mean_tokens": _mean(lengths),
    }


def _text_values(text: Continuation, tokenizer: Any) -> dict[str, Any]:
    """Returns a text with its figures."""
    return {
        "text": tokenizer.decode(text.text_tokens),
        "tokens": len(text.text_tokens),
        "ended": text.is_ended,
        "repetition_rate": text.repetition_rate,
        "loop_period": text.loop_period,
    }


def _mean(values: Sequence[float]) -> float | None:
    """Returns the mean, or None if there are no values."""
    return sum(values) / len(values) if values else None


def _ratio_and_stderr(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Returns the mean over all tokens of n texts, and its standard error if n is above 1.

    The tokens of one text are not independent, so the error is that of a ratio of sums over texts.

    Args:
        sums: over the tokens of each text, float64 [n]
        counts: tokens of each text, int64 [n]
    """
    mean = sums.sum() / counts.sum()
    n = len(sums)
    if n < 2:
        return mean.item(), None
    deviations = sums - mean * counts
    error = (deviations.square().sum() * n / (n - 1)).sqrt() / counts.sum()
    return mean.item(), error.item()
