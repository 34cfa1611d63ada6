"""Windows that the full-precision model writes itself, sampled from its whole distribution at temperature 1.

Why an own loop and not ``generate``: a window holds several documents, so sampling goes on after an end
token, nothing of the model's generation config (forced, suppressed or minimum tokens) may bend the
distribution, and every window is equally long, so that no step needs padding or an attention mask.

Measured on two CPU cores: ``grouped_mm`` and ``eager`` experts are equally fast, ``batched_mm`` (which
gathers weights per token) eleven times slower; the model's own setting, ``grouped_mm`` by default, is left
alone. A cache that grows by concatenation copies itself at every step; ``_Preallocated`` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from gemq.data.sources import SELF
from gemq.data.steps import Step, Steps
from gemq.data.windows import Windows
from gemq.resources.ranks import ALONE, Ranks

SMALL_CACHE_BYTES, CACHE_BYTES = 4_000_000_000, 16_000_000_000
"""For keys and values of the windows that are written side by side, in float32: see ``batch_size``."""

FEWEST_WINDOWS = 32
"""Written side by side if ``CACHE_BYTES`` hold so many."""

FREE = -1
"""Marks a position whose token is sampled rather than given."""

FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2024{%- endmacro -%}"
"""Goes before a chat template: some write today's date, and the windows must not depend on it."""


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
    ranks: Ranks = ALONE,
    static: bool | None = None,
) -> Generated:
    """Windows of ``window`` tokens that ``model`` samples from itself, by one plan after the other.

    A window opens as its plan says, by default with BOS, or with a random token where the model has none; after an end
    token the next document opens with BOS or such a token. With a chat template every second window opens with the
    beginning of a user turn, and the end of that turn is followed by the template's opening of the answer. Padding rows
    of the embedding and the pad token are never sampled.

    batch:    windows written side by side; by default as ``batch_size`` has it, 512 at most.
              Batch i of a plan depends on (seed, i) and its size alone, not on PyTorch's global random state
    progress: called with (done, total) tokens
    ranks:    take turns with the batches of all plans
    static:   steps over a static cache, as ``data.steps`` has it; by default on a GPU
    """
    batch = batch or batch_size(model.config.get_text_config(), window)
    vocabulary = _Vocabulary.of(model, tokenizer)
    opening = _chat_opening(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    chat = opening is not None and 0 < len(opening.user) < window
    wanted = sum(plan.count // 2 for plan in plans) if opening is not None else 0

    was_training = model.training
    model.eval()
    parts: list[Tensor | None] = []
    steps = Steps(model, window, static)
    documents = launched = 0
    batches = [(plan, number, start) for plan in plans for number, start in enumerate(range(0, plan.count, batch))]
    sizes = [min(batch, plan.count - start) for plan, _, start in batches]
    try:
        for turn, ((plan, number, start), rows) in enumerate(zip(batches, sizes, strict=True)):
            if turn % ranks.count != ranks.rank:
                parts.append(None)
                continue
            run = _Batch(vocabulary, rows, window, _generator(plan.seed, number, model.device))
            run.open_with(plan.openings)
            if chat:
                assert opening is not None
                run.open_chats(opening, rows=range((start + 1) % 2, rows, 2))
            report = None
            if progress:
                before = sum(sizes[:turn]) * window
                report = lambda done, before=before, rows=rows: progress(before + done * rows, sum(sizes) * window)
            parts.append(run.write(steps.begin(rows), report))
            launched += rows * bool(steps.why)
            documents += run.documents
    finally:
        model.train(was_training)
    written = [ranks.broadcast(part, number % ranks.count).cpu() for number, part in enumerate(parts)]
    documents, launched = ranks.count_up(documents), ranks.count_up(launched)
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


@dataclass(frozen=True)
class _ChatOpening:
    user: list[int]
    """What stands before the user's message."""
    answer: list[int]
    """What stands between the user's message and the answer."""


@dataclass
class _Batch:
    """Windows written side by side, one token of each per step."""

    vocabulary: _Vocabulary
    rows: int
    window: int
    generator: torch.Generator
    given: Tensor = field(init=False)
    """int64 [rows, window]: tokens that are not sampled, FREE elsewhere"""
    answers: dict[int, list[int]] = field(init=False, default_factory=dict)
    """By row of a chat whose user is still writing: what opens the answer."""
    documents: int = field(init=False)

    def __post_init__(self) -> None:
        self.given = torch.full((self.rows, self.window), FREE, device=self.generator.device)
        self.documents = self.rows
        self._open_documents(torch.arange(self.rows, device=self.given.device), 0)

    def open_with(self, openings: Openings) -> None:
        """Draws each window's first token."""
        device = self.given.device
        if openings.tokens is not None:
            drawn = torch.randint(len(openings.tokens), (self.rows,), generator=self.generator, device=device)
            self.given[:, 0] = openings.tokens.to(device)[drawn]
        if openings.random:
            random = torch.rand(self.rows, generator=self.generator, device=device) < openings.random
            self._open_randomly(random.nonzero()[:, 0], 0)

    def open_chats(self, opening: _ChatOpening, rows: Iterable[int]) -> None:
        for row in rows:
            self.given[row, : len(opening.user)] = torch.tensor(opening.user, device=self.given.device)
            self.answers[row] = opening.answer

    @torch.no_grad()
    def write(self, next_logits: Step, report: Callable[[int], None] | None) -> Tensor:
        """int64 [rows, window] on the CPU. ``report`` takes the tokens per window written so far."""
        device = self.given.device
        ends = torch.tensor(sorted(self.vocabulary.ends), dtype=torch.int64, device=device)
        tokens = torch.empty_like(self.given)
        tokens[:, 0] = self.given[:, 0]
        unsampled = None
        for step in range(1, self.window):
            logits = next_logits(tokens[:, step - 1 : step])  # [rows, V]
            if unsampled is None:
                unsampled = torch.ones(logits.shape[-1], dtype=torch.bool, device=device)
                unsampled[torch.tensor(sorted(self.vocabulary.known), device=device)] = False
            sampled = sample(logits.masked_fill(unsampled, -torch.inf), self.generator)
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
            self._open_randomly(rows, step)

    def _open_randomly(self, rows: Tensor, step: int) -> None:
        starts = self.vocabulary.starts.to(rows.device)
        drawn = torch.randint(len(starts), (len(rows),), generator=self.generator, device=rows.device)
        self.given[rows, step] = starts[drawn]


def sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token int64 [rows] from the softmax of each row of ``logits`` float32 [rows, V].

    By the inverse of the distribution function: one random number a row, where ``torch.multinomial`` draws
    one for every token of the vocabulary (measured, 3.5 times slower on a CPU). Sums in float64, because in
    float32 the tail of a large vocabulary would be lost.
    """
    below = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    chance = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64, device=logits.device)
    # right: a token of probability 0 has the same sum as its neighbour below, which is then found first.
    return torch.searchsorted(below, chance * below[:, -1:], right=True)[:, 0]


def _token_ids(holders: Iterable[Any], name: str) -> list[int]:
    """All token ids that the holders give for ``name``, in order; a value may be missing, one id or a
    list."""
    values = (getattr(holder, name, None) for holder in holders)
    return [i for v in values if v is not None for i in (v if isinstance(v, list | tuple) else [v])]


def _chat_opening(tokenizer: Any) -> _ChatOpening:
    """What the chat template writes around a user's message; empty when it cannot render one."""
    message = "gemq-user-message"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
        )
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return _ChatOpening([], [])  # counted by the caller
    user, found, answer = text.partition(message)
    if not found:
        return _ChatOpening([], [])
    encode = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    return _ChatOpening(encode(user), encode(answer))


def cache_bytes(config: Any, window: int, itemsize: int) -> int:
    """Bytes of one window's keys and values in a type of ``itemsize`` bytes."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    each = getattr(config, "head_dim", None)
    if each is None and heads:
        each = config.hidden_size // config.num_attention_heads
    latent = isinstance(getattr(config, "kv_lora_rank", None), int)  # heads that are made from less, or more
    width = heads * each if heads and each and not latent else config.hidden_size
    return config.num_hidden_layers * width * window * 2 * itemsize


def batch_size(config: Any, window: int) -> int:
    """Windows written side by side: from the configuration alone, so that results do not depend on the machine, but on
    a GPU with room for more (``fewer_batches``).

    What 4 GB hold if every head had keys and values of its own in float32; a large model gets more, since a step of a
    few windows takes as long as one of many.
    """
    rows = SMALL_CACHE_BYTES // (config.num_hidden_layers * config.hidden_size * window * 2 * 4)
    more = min(FEWEST_WINDOWS, CACHE_BYTES // cache_bytes(config, window, 4))
    return max(1, min(512, max(rows, more)))


def fewer_batches(count: int, batch: int, most: int) -> int:
    """How many of ``count`` windows a GPU with room for ``most`` writes side by side: at least ``batch``, evenly.

    A step of twice as many takes a fifth longer. Two batches at least, as two GPUs may share them.
    """
    batches = max(2, -(-count // max(1, most)))
    return -(-count // batches) if batches < -(-count // batch) else batch


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    # Mixed first: a CPU generator looks at 32 bits of its seed only, where seed and number have to differ.
    mixed = np.random.SeedSequence([seed, number]).generate_state(1)
    return torch.Generator(device).manual_seed(int(mixed[0]))
