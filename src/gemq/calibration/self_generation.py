"""Windows that the full-precision model writes itself, sampled from its whole distribution at temperature 1.

Why an own loop and not ``generate``: a window holds several documents, so sampling goes on after an end
token, nothing of the model's generation config (forced, suppressed or minimum tokens) may bend the
distribution, and every window is equally long, so that no step needs padding or an attention mask.

Measured on two CPU cores: ``grouped_mm`` and ``eager`` experts are equally fast, ``batched_mm`` (which
gathers weights per token) eleven times slower; the model's own setting, ``grouped_mm`` by default, is left
alone. A cache that grows by concatenation copies itself at every step; that of ``calibration.generation_steps`` does
not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.calibration.generation_steps import Step, Steps
from gemq.calibration.sources import SELF
from gemq.calibration.windows import Windows
from gemq.models.chat_template import ChatOpening, chat_opening, has_template
from gemq.models.config_values import layer_configs
from gemq.runtime.ranks import SINGLE, Ranks

SMALL_CACHE_BYTES, CACHE_BYTES = 4_000_000_000, 16_000_000_000
"""For keys and values of the windows that are written side by side, in float32: see ``batch_size``."""

FEWEST_WINDOWS = 32
"""Written side by side if ``CACHE_BYTES`` hold so many."""

FREE = -1
"""Marks a position whose token is sampled rather than given."""


@dataclass(frozen=True, eq=False)
class Openings:
    """How windows begin where a chat template does not say: with BOS, unless something else is asked for here.

    tokens: int64 [n], of which one, drawn at random, opens each window. Windows that begin in the middle of a document
            are of more kinds than those that begin with BOS, most of which are of the kinds with the shortest documents
    random: share of the windows that open with a random token of the vocabulary instead
    """

    tokens: Tensor | None = None
    random: float = 0.0


OF_THE_SOURCE = Openings(random=1.0)
"""Windows of the source ``self``: measured better than BOS (docs/lab-log.md)."""


def added_to(windows: Windows) -> Openings:
    """How windows open that the model writes beside these.

    A text shows what its documents hold; the model's own windows miss kinds, which random tokens find.
    """
    texts = [i for i, name in enumerate(windows.names) if name != SELF]
    known = windows.tokens[torch.isin(windows.source, torch.tensor(texts))] if texts else windows.tokens
    return Openings(known.flatten(), 0.0 if texts else 0.5)


@dataclass(frozen=True, eq=False)
class Plan:
    """``count`` windows to be written from ``seed``, which open as ``openings`` says."""

    count: int
    seed: int
    openings: Openings = Openings()

    def draws(self, window: int) -> Tensor:
        """Random numbers float64 [count, window] in [0, 1), one for each token."""
        # mixed first: a generator looks at 32 bits of its seed only, and other seeds begin near this one
        mixed = np.random.SeedSequence(self.seed).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        return torch.rand(self.count, window, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Generated:
    """What the model wrote, and how."""

    tokens: list[Tensor]
    """Of each plan int64 [count, window], on the CPU"""
    documents: int
    """Documents begun, those that open a window included."""
    chat_windows: int
    """Windows that open with the chat template's user turn."""
    chat_fallbacks: int
    """Windows that should have, but the template could not be used for it."""
    launched: int
    """Windows whose steps were launched kernel by kernel on a GPU, where a static step was not to be had."""


def generate_windows(
    model: Any,
    tokenizer: Any,
    *plans: Plan,
    window: int,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE,
    static: bool | None = None,
) -> Generated:
    """Windows of ``window`` tokens that ``model`` samples from itself, by one plan after the other.

    A window opens as its plan says, by default with BOS, or with a random token where the model has none; after an end
    token the next document opens with BOS or such a token. With a chat template every second window opens with the
    beginning of a user turn, and the end of that turn is followed by the template's opening of the answer. Padding rows
    of the embedding and the pad token are never sampled.

    batch:    windows written side by side at most, whichever plans they are of; by default as ``batch_size`` has it.
              Window i of a plan depends on (seed, i) and how logits are rounded, not on PyTorch's global random state
    progress: called with (done, total) tokens
    ranks:    take turns with the batches
    static:   steps over a static cache, as ``calibration.generation_steps`` has it; by default on a GPU
    """
    vocabulary = _Vocabulary.of(model, tokenizer)
    opening = chat_opening(tokenizer) if has_template(tokenizer) else None
    chat = opening if opening is not None and 0 < len(opening.user) < window else None
    wanted = sum(plan.count // 2 for plan in plans) if opening is not None else 0
    total = sum(plan.count for plan in plans)
    rows = evenly(total, batch or batch_size(model.config.get_text_config(), window))
    batches = _Batch.of(plans, window, vocabulary, chat).split(rows)

    was_training = model.training
    model.eval()
    parts: list[Tensor | None] = [None] * len(batches)
    steps = Steps(model, window, static)
    documents = launched = before = 0
    try:
        for turn, drafted in enumerate(batches):
            rows = len(drafted.given)
            if turn % ranks.count == ranks.rank:
                report = None
                if progress:
                    report = lambda done, before=before, rows=rows: progress(before + done * rows, total * window)
                own = drafted.to(model.device)
                parts[turn] = own.write(steps.begin(rows), report)
                launched += rows * bool(steps.why)
                documents += own.documents
            before += rows * window
    finally:
        model.train(was_training)
    written = [ranks.broadcast(part, number % ranks.count).cpu() for number, part in enumerate(parts)]
    documents, launched = ranks.all_reduce_int(documents), ranks.all_reduce_int(launched)
    whole = torch.cat([torch.empty(0, window, dtype=torch.int64), *written])
    tokens = list(whole.split([plan.count for plan in plans]))
    return Generated(tokens, documents, wanted if chat else 0, 0 if chat else wanted, launched)


@dataclass(frozen=True)
class _Vocabulary:
    """Which tokens begin and end documents, and which may be sampled."""

    bos: int | None
    ends: frozenset[int]
    known: frozenset[int]
    """Tokens of the tokenizer, pad excepted. The embedding may have more rows, which no text contains."""
    starts: Tensor
    """int64 [S]: tokens that may open a document when there is no BOS"""

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> _Vocabulary:
        config = model.config.get_text_config()
        holders = [getattr(model, "generation_config", None), config, tokenizer]
        bos = next(iter(_token_ids(holders, "bos_token_id")), None)
        ends = frozenset(_token_ids(holders, "eos_token_id"))
        # A pad token that also ends documents has to stay, or no document would end.
        never = frozenset(_token_ids(holders, "pad_token_id")) - ends - {bos}
        known = frozenset(i for i in tokenizer.get_vocab().values() if i < config.vocab_size) - never
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        starts = sorted(known - special - ends - set(tokenizer.all_special_ids))
        return cls(bos, ends, known, torch.tensor(starts, dtype=torch.int64))


@dataclass
class _Batch:
    """Windows written side by side, one token of each per step."""

    vocabulary: _Vocabulary
    given: Tensor
    """int64 [rows, window]: tokens that are not sampled, FREE elsewhere"""
    draws: Tensor
    """float64 [rows, window]: the random number in [0, 1) that decides about each token, sampled or not"""
    answers: dict[int, list[int]]
    """By row of a chat whose user is still writing: what opens the answer."""
    documents: int
    """Begun so far."""

    @classmethod
    def of(cls, plans: Sequence[Plan], window: int, vocabulary: _Vocabulary, chat: ChatOpening | None) -> _Batch:
        """All windows of ``plans``, one after the other, on the CPU. Every second one of a plan opens as ``chat``."""
        draws = torch.cat([torch.empty(0, window, dtype=torch.float64), *(plan.draws(window) for plan in plans)])
        batch = cls(vocabulary, torch.full(draws.shape, FREE), draws, {}, len(draws))
        first = 0
        for plan in plans:
            batch._open(range(first, first + plan.count), plan.openings)
            if chat is not None:
                for row in range(first + 1, first + plan.count, 2):
                    batch.given[row, : len(chat.user)] = torch.tensor(chat.user)
                    batch.answers[row] = chat.answer
            first += plan.count
        return batch

    def split(self, rows: int) -> list[_Batch]:
        """Batches of ``rows`` windows."""
        parts = []
        for first in range(0, len(self.given), rows):
            own = slice(first, first + rows)
            answers = {row - first: answer for row, answer in self.answers.items() if first <= row < first + rows}
            given = self.given[own]
            parts.append(_Batch(self.vocabulary, given, self.draws[own], answers, len(given)))
        return parts

    @property
    def window(self) -> int:
        return self.given.shape[1]

    def to(self, device: torch.device) -> _Batch:
        return dataclasses.replace(self, given=self.given.to(device), draws=self.draws.to(device))

    def _open(self, rows: range, openings: Openings) -> None:
        """Gives the first token of ``rows``, all of them with the same openings."""
        every = torch.arange(rows.start, rows.stop)
        self._open_documents(every, 0)
        chance = self.draws[every, 0]
        if openings.tokens is not None:
            share = (chance - openings.random) / (1 - openings.random)
            self.given[every, 0] = _picked(openings.tokens, share.clamp_min(0))
        random = chance < openings.random
        self.given[every[random], 0] = _picked(self.vocabulary.starts, chance[random] / openings.random)

    @torch.no_grad()
    def write(self, next_logits: Step, report: Callable[[int], None] | None) -> Tensor:
        """Tokens int64 [rows, window] on the CPU. ``report`` takes the tokens per window written so far."""
        device = self.given.device
        ends = torch.tensor(sorted(self.vocabulary.ends), dtype=torch.int64, device=device)
        tokens = torch.empty_like(self.given)
        tokens[:, 0] = self.given[:, 0]
        unsampled = None
        for step in range(1, self.window):
            logits = next_logits(tokens[:, step - 1 : step])  # [rows, V]
            if unsampled is None:
                unsampled = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
                known = [i for i in sorted(self.vocabulary.known) if i < len(unsampled)]  # a head may have fewer rows
                unsampled[torch.tensor(known, device=device)] = False
            sampled = sample(logits.masked_fill(unsampled, -torch.inf), self.draws[:, step])
            given = self.given[:, step]
            free = given == FREE
            tokens[:, step] = torch.where(free, sampled, given)
            ended = (free & torch.isin(sampled, ends)).nonzero()[:, 0]
            if len(ended):
                self._go_on(ended, sampled[ended].tolist(), step + 1)
            if report:
                report(step + 1)
        return tokens.cpu()

    def _go_on(self, ended: Tensor, tokens: list[int], step: int) -> None:
        """Gives what follows the end tokens that the rows ``ended`` int64 [n] have just written before
        ``step``."""
        fresh = []
        for row, token in zip(ended.tolist(), tokens, strict=True):
            answer = self.answers.pop(row, None)
            if answer and answer[0] == token:  # it ended the user's turn, not the conversation
                follow = torch.tensor(answer[1:], device=self.given.device)[: self.window - step]
                self.given[row, step : step + len(follow)] = follow
            elif step < self.window:
                self.documents += 1
                if token != self.vocabulary.bos:  # else the end token is the next one's beginning
                    fresh.append(row)
        if fresh:
            self._open_documents(torch.tensor(fresh, device=self.given.device), step)

    def _open_documents(self, rows: Tensor, step: int) -> None:
        if self.vocabulary.bos is not None:
            self.given[rows, step] = self.vocabulary.bos
        else:
            self.given[rows, step] = _picked(self.vocabulary.starts.to(rows.device), self.draws[rows, step])


def _picked(tokens: Tensor, share: Tensor) -> Tensor:
    """Those of ``tokens`` that numbers in [0, 1) stand for."""
    return tokens[(share * len(tokens)).long().clamp_max(len(tokens) - 1)]


def sample(logits: Tensor, chance: Tensor) -> Tensor:
    """One token int64 [rows] of the softmax of each row of ``logits`` float32 [rows, V], by ``chance`` float64 [rows].

    By the inverse of the distribution function: one random number in [0, 1) a row, where ``torch.multinomial`` draws
    one for every token of the vocabulary (measured, 3.5 times slower on a CPU). Sums in float64, because in
    float32 the tail of a large vocabulary would be lost.
    """
    below = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    # right: a token of probability 0 has the same sum as its neighbour below, which is then found first.
    return torch.searchsorted(below, chance[:, None] * below[:, -1:], right=True)[:, 0]


def _token_ids(holders: Iterable[Any], name: str) -> list[int]:
    """All token ids that the holders give for ``name``, in order; a value may be missing, one id or a
    list."""
    values = (getattr(holder, name, None) for holder in holders)
    return [i for v in values if v is not None for i in (v if isinstance(v, list | tuple) else [v])]


def cache_bytes(config: Any, window: int, itemsize: int) -> int:
    """Bytes of one window's keys and values in all layers, in a type of ``itemsize`` bytes."""
    return sum(map(_cache_width, layer_configs(config))) * window * 2 * itemsize


def _cache_width(config: Any) -> int:
    """Numbers that a layer keeps as a token's key, and as many as its value."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    each = getattr(config, "head_dim", None)
    if each is None and heads:
        each = config.hidden_size // config.num_attention_heads
    latent = isinstance(getattr(config, "kv_lora_rank", None), int)  # heads that are made from less, or more
    return heads * each if heads and each and not latent else config.hidden_size


def batch_size(config: Any, window: int) -> int:
    """Windows written side by side, from the configuration alone. A GPU with room takes more (``side_by_side``): what
    is written differs by how logits are rounded then.

    What 4 GB hold if every head had keys and values of its own in float32; a large model gets more, since a step of a
    few windows takes as long as one of many.
    """
    rows = SMALL_CACHE_BYTES // (len(layer_configs(config)) * config.hidden_size * window * 2 * 4)
    more = min(FEWEST_WINDOWS, CACHE_BYTES // cache_bytes(config, window, 4))
    return max(1, min(512, max(rows, more)))


def evenly(count: int, most: int) -> int:
    """Windows of a batch if ``count`` are written in as few batches as there can be with ``most`` in each."""
    return max(1, -(-count // max(1, -(-count // max(1, most)))))


def side_by_side(count: int, least: int, room: int) -> int:
    """How many of ``count`` windows a GPU writes in a batch at most: all it has ``room`` for, but ``least`` anyhow.

    A step of twice as many takes a fifth longer. Two batches at least, as two GPUs may share them.
    """
    return max(least, min(room, -(-count // 2)))
