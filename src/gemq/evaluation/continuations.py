"""Prompts from the texts of an evaluation, and what a model writes after them, greedily and sampled.

All texts of a model are written in parallel by the steps that also write calibration windows
(``calibration.generation_steps``). Penalties and other settings of a generation configuration do not apply, since they
would hide what a model does by itself. Two models draw the same random numbers for the same prompt.

Shapes: R texts that are written in parallel, S tokens of the longest prompt and its continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.generation_steps import Step, Stepper
from gemq.calibration.self_generation import FREE, WindowPlan, even_batch_size, sample
from gemq.calibration.tokens import check_tokens
from gemq.calibration.vocabulary import Vocabulary
from gemq.calibration.windows import Windows
from gemq.evaluation.repetition import loop_period, repetition_rate
from gemq.models.chat_template import ChatOpening, chat_opening, has_template

GREEDY, SAMPLED = MODES = ("greedy", "sampled")
"""How tokens are chosen: the most likely one, or drawn from the whole distribution at temperature 1."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text.

    Attributes:
        source: name of the text that it is from
        text_tokens: its tokens in that text
        tokens: what models continue: the same, in the chat template or after BOS where the tokenizer adds them
    """

    source: str
    text_tokens: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Prompts:
    """The prompts of a generation check.

    Attributes:
        prompts: of which those of one text are consecutive
        num_templated: how many are in the chat template, as a user's message
        has_unusable_template: whether the tokenizer has a template that could not be applied
    """

    prompts: list[Prompt]
    num_templated: int
    has_unusable_template: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.tokens) for prompt in self.prompts)


def choose_prompts(windows: Windows, tokenizer: Any, count: int, length: int, embeddings: int | None) -> Prompts:
    """Takes prompts from the windows of an evaluation, equally many of each text and evenly spaced.

    A prompt that contains special tokens, as texts made of conversations do, does not go into the chat template.

    Args:
        windows: of at least ``length`` tokens
        tokenizer: of the model
        count: upper bound for the number of prompts; texts may be too short for as many
        length: tokens of a prompt, without what the tokenizer adds
        embeddings: number of tokens that the model has embeddings for; None: unknown

    Raises:
        UserError: the chat template has tokens that the model does not have
    """
    opening = chat_opening(tokenizer) if has_template(tokenizer) else ChatOpening([], [])
    check_tokens(torch.tensor([*opening.user, *opening.answer]), embeddings, tokenizer, "the chat template")
    has_opening = bool(opening.user or opening.answer)
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    beginning = _beginning_of_text(tokenizer)
    prompts, num_templated = [], 0
    for source, segment in _choose_segments(windows, count, length):
        if has_opening and not special.intersection(segment):
            tokens = [*opening.user, *segment, *opening.answer]
            num_templated += 1
        else:
            tokens = [*beginning, *segment]
        prompts.append(Prompt(windows.names[source], segment, tokens))
    return Prompts(prompts, num_templated, has_template(tokenizer) and not has_opening)


def _choose_segments(windows: Windows, count: int, length: int) -> list[tuple[int, list[int]]]:
    """Returns the tokens of up to ``count`` segments of windows, each with the index of its source."""
    num_sources = len(windows.names)
    segments = []
    for source, tokens in enumerate(windows.by_source()):
        per_window = windows.seq_len // length
        available = tokens[:, : per_window * length].reshape(-1, length)
        share = min(len(available), count // num_sources + (source < count % num_sources))
        for index in range(share):
            segments.append((source, available[index * len(available) // share].tolist()))
    return segments


def _beginning_of_text(tokenizer: Any) -> list[int]:
    """Returns BOS if the tokenizer begins every text with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        tokens: including the end token, if it wrote one
        is_ended: whether it wrote an end token
    """

    tokens: list[int]
    is_ended: bool

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the end token."""
        return self.tokens[:-1] if self.is_ended else self.tokens

    @property
    def loop_period(self) -> int | None:
        """The period of the loop that the text did not leave (``repetition.loop_period``). A text that ends left it."""
        return None if self.is_ended else loop_period(self.tokens)

    @property
    def repetition_rate(self) -> float | None:
        """See ``repetition.repetition_rate``."""
        return repetition_rate(self.text_tokens)


@dataclass(frozen=True)
class WrittenTexts:
    """What one model wrote.

    Attributes:
        by_mode: a continuation of each prompt, by mode
        eager_reason: why a GPU launched the steps kernel by kernel, or empty
    """

    by_mode: dict[str, list[Continuation]]
    eager_reason: str


@torch.no_grad()
def write_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    seed: int,
    max_rows: int,
    progress: Callable[[int, int], None],
) -> WrittenTexts:
    """Continues all prompts in all modes.

    Args:
        model: with all of its layers
        tokenizer: of the model
        new_tokens: upper bound for the tokens of a continuation
        seed: of the sampled texts
        max_rows: upper bound for the texts that are written in parallel
        progress: called with the number of tokens written, and of all tokens
    """
    seq_len = max(len(prompt.tokens) for prompt in prompts) + new_tokens
    prescribed = torch.full((len(prompts), seq_len), FREE)
    for row, prompt in enumerate(prompts):
        prescribed[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
    num_texts = len(MODES) * len(prompts)
    rows = _Rows(
        prescribed.repeat(len(MODES), 1),
        WindowPlan(len(prompts), seed).draws(seq_len).repeat(len(MODES), 1),
        torch.arange(num_texts) < len(prompts),
    )
    ends = Vocabulary.from_model(model, tokenizer).ends
    stepper = Stepper(model, seq_len)
    texts: list[list[int]] = []
    batch_size = even_batch_size(num_texts, max_rows)
    for start in range(0, num_texts, batch_size):
        batch = rows.select(slice(start, start + batch_size), model.device)
        report = partial(_report, progress, start * seq_len, len(batch.prescribed), num_texts * seq_len)
        texts += batch.write(stepper.begin(len(batch.prescribed)), ends, report).tolist()
    continuations = []
    for row, tokens in enumerate(texts):
        start = len(prompts[row % len(prompts)].tokens)
        continuations.append(_up_to_end(tokens[start : start + new_tokens], ends))
    by_mode = {GREEDY: continuations[: len(prompts)], SAMPLED: continuations[len(prompts) :]}
    return WrittenTexts(by_mode, stepper.eager_reason)


def _report(progress: Callable[[int, int], None], tokens_before: int, rows: int, total: int, done: int) -> None:
    """Reports the progress of all batches.

    Args:
        progress: called with the number of tokens written, and of all tokens
        tokens_before: of the batches before
        rows: texts of the batch
        total: tokens of all batches
        done: tokens written of each text of the batch
    """
    progress(tokens_before + done * rows, total)


@dataclass(frozen=True)
class _Rows:
    """Texts that are written in parallel.

    Attributes:
        prescribed: the prompts, int64 [R, S], FREE after them
        draws: the random number in [0, 1) that decides about each sampled token, float64 [R, S]
        is_greedy: whether the most likely tokens are written, bool [R]
    """

    prescribed: Tensor
    draws: Tensor
    is_greedy: Tensor

    def select(self, rows: slice, device: torch.device) -> _Rows:
        """Returns the texts ``rows`` on ``device``."""
        return _Rows(self.prescribed[rows].to(device), self.draws[rows].to(device), self.is_greedy[rows].to(device))

    def write(self, step: Step, ends: Collection[int], report: Callable[[int], None]) -> Tensor:
        """Writes until every text has an end token or is as long as it may be.

        Args:
            step: of the model
            ends: the tokens that end a text
            report: called with the tokens written so far of each text, prompts included

        Returns:
            The prompts with what was written after them, int64 [R, S] on the CPU. FREE where nothing was written.
        """
        num_rows, seq_len = self.prescribed.shape
        is_free = self.prescribed == FREE
        end_tokens = torch.tensor(sorted(ends), dtype=torch.int64, device=self.prescribed.device)
        tokens = self.prescribed.clone()
        is_ended = torch.zeros(num_rows, dtype=torch.bool, device=tokens.device)
        position = int(is_free.any(0).int().argmax())  # the length of the shortest prompt
        logits = step(tokens[:, :position])
        while True:
            chosen = self._choose(logits, self.draws[:, position])
            tokens[:, position] = torch.where(is_free[:, position], chosen, tokens[:, position])
            is_ended |= is_free[:, position] & torch.isin(chosen, end_tokens)
            position += 1
            report(position)
            if position == seq_len or is_ended.all():
                return tokens.cpu()
            logits = step(tokens[:, position - 1 : position])

    def _choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Returns the next token of each text, int64 [R], from logits [R, V] and a draw for each text, [R]."""
        sampled = sample(logits, draws).clamp_max(logits.shape[-1] - 1)  # NaN is reported when windows are scored
        return torch.where(self.is_greedy, logits.argmax(-1), sampled)


def _up_to_end(tokens: list[int], ends: Collection[int]) -> Continuation:
    """Returns the continuation that ends with the first end token among ``tokens``, or after all of them."""
    for index, token in enumerate(tokens):
        if token in ends:
            return Continuation(tokens[: index + 1], True)
    return Continuation(tokens, False)
