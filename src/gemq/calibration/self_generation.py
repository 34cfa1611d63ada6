"""Windows that the full-precision model writes itself, sampled from its whole distribution at temperature 1.

``generate`` of Transformers is not used: a window holds several documents, so sampling continues after an end token;
the model's generation config (forced, suppressed or minimum tokens) must not change the distribution; and all windows
have equal lengths, so that no step needs padding or an attention mask.

Measured on two CPU cores: ``grouped_mm`` and ``eager`` experts are equally fast, and ``batched_mm``, which gathers
weights per token, is eleven times slower. The model's own setting, by default ``grouped_mm``, is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.calibration.generation_steps import Step, Stepper
from gemq.calibration.sources import SELF
from gemq.calibration.vocabulary import Vocabulary
from gemq.calibration.windows import Windows
from gemq.models.cache_size import estimated_cache
from gemq.models.chat_template import ChatOpening, chat_opening, has_template
from gemq.models.config_values import layer_configs
from gemq.runtime.integers import ceil_div
from gemq.runtime.ranks import SINGLE, Ranks

SMALL_CACHE_BYTES, CACHE_BYTES = 4_000_000_000, 16_000_000_000
"""Limits for the float32 keys and values of a batch of windows: see ``batch_size``."""

LARGE_MODEL_BATCH_SIZE = 32
"""Windows of a batch of a model for which ``SMALL_CACHE_BYTES`` hold fewer, if ``CACHE_BYTES`` hold as many."""

MAX_BATCH_SIZE = 512

FREE = -1
"""Marks a position whose token is sampled rather than prescribed."""


@dataclass(frozen=True, eq=False)
class Openings:
    """How windows begin if the chat template does not say: with BOS, unless this sets other tokens.

    Attributes:
        tokens: int64 [n], one of which, drawn at random, opens each window. Windows that begin inside a document are
            more diverse than those that begin with BOS, most of which are of the kinds with the shortest documents.
        random: fraction of the windows that open with a random token of the vocabulary instead.
    """

    tokens: Tensor | None = None
    random: float = 0.0


SELF_SOURCE_OPENINGS = Openings(random=1.0)
"""Openings of the source ``self``: measured better than BOS (docs/lab-log.md)."""


def added_window_openings(windows: Windows) -> Openings:
    """Openings of the windows that the model writes in addition to ``windows``.

    They begin with tokens of the texts among ``windows``. Without a text, half of them begin with random tokens, since
    the model's own windows lack some kinds of documents.
    """
    text_sources = [index for index, name in enumerate(windows.names) if name != SELF]
    if not text_sources:
        return Openings(windows.tokens.flatten(), 0.5)
    is_text = torch.isin(windows.source, torch.tensor(text_sources))
    return Openings(windows.tokens[is_text].flatten(), 0.0)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Windows to write.

    Attributes:
        count: number of windows.
        seed: of the random numbers.
        openings: how the windows begin.
    """

    count: int
    seed: int
    openings: Openings = Openings()

    def draws(self, seq_len: int) -> Tensor:
        """Random numbers float64 [count, seq_len] in [0, 1), one for each token."""
        # a generator uses 32 bits of its seed only, and other seeds are close to this one: mix the bits
        mixed_seed = np.random.SeedSequence(self.seed).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed_seed[0]))
        return torch.rand(self.count, seq_len, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class GeneratedWindows:
    """The windows that a model wrote."""

    tokens: list[Tensor]
    """For each plan int64 [count, seq_len], on the CPU."""
    documents: int
    """Documents begun, including those that open a window."""
    chat_windows: int
    """Windows that open with the chat template's user turn."""
    chat_fallbacks: int
    """Windows that should open with it, but the template could not be used."""
    eager_windows: int
    """Windows whose steps a GPU launched kernel by kernel, because a static step was not possible."""


def generate_windows(
    model: Any,
    tokenizer: Any,
    *plans: WindowPlan,
    seq_len: int,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE,
    static: bool | None = None,
) -> GeneratedWindows:
    """Samples windows from ``model``.

    A window opens as its plan says, by default with BOS, or with a random token if the model has none. After an end
    token the next document opens with BOS or a random token. With a chat template every second window opens with the
    beginning of a user turn, and the end of that turn is followed by the template's opening of the answer. Padding rows
    of the embedding and the pad token are never sampled.

    Window i of a plan depends on its seed, on i and on how logits are rounded, but not on PyTorch's global random
    state.

    Args:
        model: the model or a packed copy of it.
        tokenizer: of the model.
        plans: the windows to write, in order.
        seq_len: tokens of a window.
        batch: upper bound for the windows of a batch, which may belong to several plans. By default ``batch_size``.
        progress: called with the number of written tokens and the total.
        ranks: the processes that divide the batches among themselves.
        static: whether to use a static cache, see ``calibration.generation_steps``. By default on a GPU.
    """
    opening = chat_opening(tokenizer) if has_template(tokenizer) else None
    chat = opening if opening is not None and 0 < len(opening.user) < seq_len else None
    total = sum(plan.count for plan in plans)
    size = even_batch_size(total, batch or batch_size(model.config.get_text_config(), seq_len))
    batches = _Batch.from_plans(plans, seq_len, Vocabulary.from_model(model, tokenizer), chat).split(size)

    was_training = model.training
    model.eval()
    written: list[Tensor | None] = [None] * len(batches)
    steps = Stepper(model, seq_len, static)
    documents = eager_windows = 0
    try:
        for index, planned in enumerate(batches):
            if index % ranks.count != ranks.rank:
                continue
            rows = len(planned.prescribed)
            report = None
            if progress:
                report = _batch_progress(progress, index * size * seq_len, rows, total * seq_len)
            device_batch = planned.to(model.device)
            written[index] = device_batch.write(steps.begin(rows), report)
            documents += device_batch.documents
            if steps.eager_reason:
                eager_windows += rows
    finally:
        model.train(was_training)
    gathered = [torch.empty(0, seq_len, dtype=torch.int64)]
    for index, tokens in enumerate(written):
        gathered.append(ranks.broadcast(tokens, index % ranks.count).cpu())
    chat_windows = sum(plan.count // 2 for plan in plans) if opening is not None else 0
    return GeneratedWindows(
        tokens=list(torch.cat(gathered).split([plan.count for plan in plans])),
        documents=ranks.all_reduce_int(documents),
        chat_windows=chat_windows if chat else 0,
        chat_fallbacks=0 if chat else chat_windows,
        eager_windows=ranks.all_reduce_int(eager_windows),
    )


def _batch_progress(
    progress: Callable[[int, int], None], tokens_before: int, rows: int, total: int
) -> Callable[[int], None]:
    """A callback for the tokens written per window of a batch, which reports the progress of all batches.

    Args:
        progress: called with the number of written tokens and the total.
        tokens_before: of the batches before.
        rows: windows of the batch.
        total: tokens of all batches.
    """
    return lambda tokens_per_window: progress(tokens_before + tokens_per_window * rows, total)


@dataclass
class _Batch:
    """Windows that are written in parallel, one token of each per step."""

    vocabulary: Vocabulary
    prescribed: Tensor
    """int64 [rows, seq_len]: tokens that are not sampled, FREE elsewhere."""
    draws: Tensor
    """float64 [rows, seq_len]: the random number in [0, 1) that decides about each token, sampled or not."""
    answers: dict[int, list[int]]
    """What opens the answer, by row of a chat whose user turn has not ended."""
    documents: int
    """Documents begun so far."""

    @classmethod
    def from_plans(
        cls, plans: Sequence[WindowPlan], seq_len: int, vocabulary: Vocabulary, chat: ChatOpening | None
    ) -> _Batch:
        """All windows of ``plans``, in order, on the CPU. Every second one of a plan opens as ``chat`` says."""
        draws = torch.cat([torch.empty(0, seq_len, dtype=torch.float64), *(plan.draws(seq_len) for plan in plans)])
        batch = cls(vocabulary, torch.full(draws.shape, FREE), draws, {}, len(draws))
        start = 0
        for plan in plans:
            stop = start + plan.count
            batch._open(range(start, stop), plan.openings)
            if chat is not None:
                for row in range(start + 1, stop, 2):
                    batch.prescribed[row, : len(chat.user)] = torch.tensor(chat.user)
                    batch.answers[row] = chat.answer
            start = stop
        return batch

    def split(self, size: int) -> list[_Batch]:
        """Batches of ``size`` windows, the last one may be smaller."""
        batches = []
        for start in range(0, len(self.prescribed), size):
            stop = start + size
            answers = {row - start: answer for row, answer in self.answers.items() if start <= row < stop}
            prescribed = self.prescribed[start:stop]
            batches.append(_Batch(self.vocabulary, prescribed, self.draws[start:stop], answers, len(prescribed)))
        return batches

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.prescribed.shape[1]

    def to(self, device: torch.device) -> _Batch:
        """The same windows on ``device``."""
        return dataclasses.replace(self, prescribed=self.prescribed.to(device), draws=self.draws.to(device))

    def _open(self, rows: range, openings: Openings) -> None:
        """Prescribes the first token of ``rows``."""
        indices = torch.arange(rows.start, rows.stop)
        self._open_documents(indices, 0)
        draws = self.draws[indices, 0]
        if openings.tokens is not None:
            share = (draws - openings.random) / (1 - openings.random)
            self.prescribed[indices, 0] = _pick(openings.tokens, share.clamp_min(0))
        is_random = draws < openings.random
        random_tokens = _pick(self.vocabulary.starts, draws[is_random] / openings.random)
        self.prescribed[indices[is_random], 0] = random_tokens

    @torch.no_grad()
    def write(self, next_logits: Step, report: Callable[[int], None] | None) -> Tensor:
        """Samples all tokens: int64 [rows, seq_len] on the CPU.

        Args:
            next_logits: one step of the model.
            report: called with the tokens per window written so far.
        """
        device = self.prescribed.device
        ends = torch.tensor(sorted(self.vocabulary.ends), dtype=torch.int64, device=device)
        tokens = torch.empty_like(self.prescribed)
        tokens[:, 0] = self.prescribed[:, 0]
        forbidden = None
        for step in range(1, self.seq_len):
            logits = next_logits(tokens[:, step - 1 : step])  # [rows, V]
            if forbidden is None:
                forbidden = self._forbidden_tokens(logits.shape[-1])
            sampled = sample(logits.masked_fill(forbidden, -torch.inf), self.draws[:, step])
            prescribed = self.prescribed[:, step]
            is_free = prescribed == FREE
            tokens[:, step] = torch.where(is_free, sampled, prescribed)
            ended = (is_free & torch.isin(sampled, ends)).nonzero()[:, 0]
            if len(ended):
                self._continue_rows(ended, sampled[ended].tolist(), step + 1)
            if report:
                report(step + 1)
        return tokens.cpu()

    def _forbidden_tokens(self, vocabulary_size: int) -> Tensor:
        """bool [V]: tokens that are never sampled."""
        device = self.prescribed.device
        forbidden = torch.ones(vocabulary_size, dtype=torch.bool, device=device)
        # a head may have fewer rows than the tokenizer has tokens
        allowed = [token for token in sorted(self.vocabulary.allowed) if token < vocabulary_size]
        forbidden[torch.tensor(allowed, device=device)] = False
        return forbidden

    def _continue_rows(self, rows: Tensor, end_tokens: list[int], step: int) -> None:
        """Prescribes the tokens from ``step`` on, after end tokens.

        Args:
            rows: int64 [n], the windows in which an end token was just sampled.
            end_tokens: those tokens.
            step: position of the next token.
        """
        opened_rows = []
        for row, token in zip(rows.tolist(), end_tokens, strict=True):
            answer = self.answers.pop(row, None)
            if answer and answer[0] == token:  # the user's turn has ended, not the conversation
                continuation = torch.tensor(answer[1:], device=self.prescribed.device)[: self.seq_len - step]
                self.prescribed[row, step : step + len(continuation)] = continuation
            elif step < self.seq_len:
                self.documents += 1
                if token != self.vocabulary.bos:  # otherwise the end token also begins the next document
                    opened_rows.append(row)
        if opened_rows:
            self._open_documents(torch.tensor(opened_rows, device=self.prescribed.device), step)

    def _open_documents(self, rows: Tensor, step: int) -> None:
        """Prescribes the first token of a document at position ``step`` of ``rows`` int64 [n]."""
        if self.vocabulary.bos is not None:
            self.prescribed[rows, step] = self.vocabulary.bos
        else:
            self.prescribed[rows, step] = _pick(self.vocabulary.starts.to(rows.device), self.draws[rows, step])


def _pick(tokens: Tensor, draws: Tensor) -> Tensor:
    """One of ``tokens`` for each random number in [0, 1), all with the same probability."""
    return tokens[(draws * len(tokens)).long().clamp_max(len(tokens) - 1)]


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """Samples one token int64 [rows] from the softmax of each row of logits, by inverting the distribution function.

    This takes one random number a row. ``torch.multinomial`` draws one for every token of the vocabulary, which was
    measured to be 3.5 times slower on a CPU. Sums are in float64: float32 would lose the tail of a large vocabulary.

    Args:
        logits: float32 [rows, V]
        draws: random numbers in [0, 1), float64 [rows]
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # right=True: a token of probability 0 has the sum of the token before it, which then comes first
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]


def batch_size(config: Any, seq_len: int) -> int:
    """Windows of a batch, from the configuration alone.

    As many as 4 GB hold if every head had its own keys and values in float32. A large model gets more, since a step of
    a few windows takes as long as a step of many. A GPU may use more (``gpu_batch_size``), which changes the windows
    only through the rounding of logits.
    """
    bytes_per_window = len(layer_configs(config)) * config.hidden_size * seq_len * 2 * 4
    rows = SMALL_CACHE_BYTES // bytes_per_window
    cache_bytes = estimated_cache(config, torch.float32).sequence_bytes(seq_len)
    large_model_rows = min(LARGE_MODEL_BATCH_SIZE, CACHE_BYTES // cache_bytes)
    return max(1, min(MAX_BATCH_SIZE, max(rows, large_model_rows)))


def even_batch_size(count: int, max_size: int) -> int:
    """The size of equal batches of ``count`` windows, as few batches as ``max_size`` allows."""
    num_batches = max(1, ceil_div(count, max(1, max_size)))
    return max(1, ceil_div(count, num_batches))


def gpu_batch_size(count: int, min_size: int, max_size: int) -> int:
    """Upper bound for the windows of a batch on a GPU.

    A step of twice as many windows takes a fifth longer, so that a batch takes what memory allows. There are at least
    two batches, for two GPUs to share, if ``count`` exceeds ``min_size``. Otherwise there is one.

    Args:
        count: number of windows.
        min_size: lower bound of the result.
        max_size: windows that fit into memory.
    """
    return max(min_size, min(max_size, ceil_div(count, 2)))
