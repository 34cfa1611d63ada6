"""How good a model is: perplexity and, against a full-precision reference, KL, top-1 and routing agreement.

Windows do not overlap, each window's first token is not scored, no BOS is added, and sums run over all tokens of all
texts. Logits are compared in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemq.assets import builtin_texts
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.load import load
from gemq.data.rows import Rows
from gemq.data.windows import Windows, eval_windows
from gemq.divergence import chunks, divergence
from gemq.errors import UserError
from gemq.inspect import Contents, inspect_checkpoint
from gemq.models.config_values import embedding_rows
from gemq.models.experts import watch_experts
from gemq.models.source import DTYPES, Source, longest_window
from gemq.models.structure import Structure, find_structure
from gemq.progress import Monitor
from gemq.resources.machine import pick_device


@dataclass
class Sums:
    """Running sums over scored tokens. KL is KL(reference || model), all in nats."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    top1: int = 0
    routed: list[float] = field(default_factory=list)
    """Per layer with experts: the sum over tokens of the share of chosen experts that both models chose."""
    routed_tokens: int = 0

    def add(self, other: Sums) -> None:
        self.tokens += other.tokens
        self.nll += other.nll
        self.kl += other.kl
        self.top1 += other.top1
        self.routed = [a + b for a, b in zip(self.routed or [0.0] * len(other.routed), other.routed, strict=True)]
        self.routed_tokens += other.routed_tokens

    def layers(self) -> list[float]:
        return [x / self.routed_tokens for x in self.routed]

    def to_dict(self, with_reference: bool) -> dict[str, Any]:
        values: dict[str, Any] = {
            "tokens": self.tokens,
            "perplexity": math.exp(min(self.nll / self.tokens, 700.0)),
        }
        if with_reference:
            values["mean_kl"] = self.kl / self.tokens
            values["top1_agreement"] = self.top1 / self.tokens
            layers = self.layers()
            values["routing_agreement"] = sum(layers) / len(layers) if layers else None
        return values


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    reference: nn.Module | None = None,
    structure: Structure | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity over ``windows``, with the figures against ``reference`` when it is given.

    structure: the reference's, whose experts' paths hold for both models; without it routing is not compared

    Returns ``tokens``, ``perplexity``, ``mean_kl``, ``top1_agreement``, ``routing_agreement``, ``texts`` (the same by
    source) and ``layers`` (routing agreement per layer with experts), as ``gemq eval --json`` prints them.
    """
    paths = [x.experts.path for _, x in structure.moe_layers if x.experts] if structure and reference else []
    by_source = [Sums() for _ in windows.names]
    done = 0
    for part in windows.batches(batch_tokens):
        ids = windows.tokens[part].to(next(model.parameters()).device)
        logits, choices = _run(model, ids, paths)
        expected, expected_choices = _run(reference, ids, paths) if reference is not None else (None, [])
        for row, source in enumerate(windows.source[part].tolist()):
            sums = _compare(logits[row], expected[row] if expected is not None else None, ids[row])
            sums.routed = [_agreement(a[row], b[row]) for a, b in zip(choices, expected_choices, strict=True)]
            sums.routed_tokens = ids.shape[1]
            by_source[source].add(sums)
        done += len(ids)
        if progress:
            progress(done, len(windows))
    total = Sums()
    for sums in by_source:
        total.add(sums)
    compared = reference is not None
    values = total.to_dict(compared)
    values["texts"] = {n: s.to_dict(compared) for n, s in zip(windows.names, by_source, strict=True)}
    values["layers"] = total.layers() if compared else []
    return values


def _run(model: nn.Module, ids: Tensor, paths: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and, per experts module, the chosen experts [B, S, K]."""
    with ExitStack() as stack:
        calls = [stack.enter_context(watch_experts(model.get_submodule(p))) for p in paths]
        logits = model(input_ids=ids, use_cache=False).logits
    return logits, [found[0].top_k_index.reshape(*ids.shape, -1) for found in calls]


def _compare(logits: Tensor, reference: Tensor | None, ids: Tensor) -> Sums:
    """One window: logits [S, V] against its tokens [S] and the reference's logits."""
    sums = Sums(tokens=len(ids) - 1)
    for rows in chunks(len(ids) - 1):
        log_q = logits[rows].float().log_softmax(-1)
        sums.nll -= log_q.gather(1, ids[rows.start + 1 : rows.stop + 1, None]).sum().item()
        if reference is not None:
            log_p = reference[rows].float().log_softmax(-1)
            sums.kl += divergence(log_p, log_q).item()
            sums.top1 += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return sums


def _agreement(chosen: Tensor, expected: Tensor) -> float:
    """Sum over tokens of the share of ``expected`` [S, K] that is also in ``chosen``, whatever the order."""
    return (expected.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1).float().mean(-1).sum().item()


@dataclass(frozen=True)
class Opened:
    """A model on disk, loaded. ``stored_bytes`` counts its tensors as they lie there."""

    model: PreTrainedModel
    source: Source
    contents: Contents | None
    """What the checkpoint holds, if it is a packed one."""
    stored_bytes: int

    @cached_property
    def tokenizer(self) -> Any:
        """Raises UserError when the model has none."""
        return self.source.tokenizer


def open_model(path: str, dtype: str, device: str, trust_remote_code: bool = False) -> Opened:
    """A packed checkpoint or any Transformers model.

    dtype: ``float32``, ``bfloat16``, or ``auto`` for the one that the checkpoint names
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype cannot be {dtype!r}: choose from auto, {', '.join(DTYPES)}")
    picked = pick_device(device)
    source = Source.resolve(path, trust_remote_code=trust_remote_code)
    if is_packed(source.path):
        contents = inspect_checkpoint(source.path)
        kind: Any = DTYPES.get(dtype, "auto")
        model = load(source.path, device=str(picked), dtype=kind, trust_remote_code=trust_remote_code)
        return Opened(model, source, contents, contents.stored_bytes)
    model, stored = source.load(picked, DTYPES.get(dtype))
    count = sum(p.numel() * stored[name].itemsize for name, p in model.named_parameters())
    return Opened(model, source, None, count)


def _experts_paths(opened: Opened) -> list[str]:
    if opened.contents is not None:
        return [path for path, _, _ in opened.contents.layers]
    return [layer.experts.path for _, layer in find_structure(opened.model).moe_layers if layer.experts]


def evaluate_paths(
    model: str,
    *,
    reference: str | None = None,
    texts: Sequence[Path] | None = None,
    text_column: str | None = None,
    window: int = 512,
    max_windows: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """``evaluate`` for models on disk: what ``gemq eval`` prints as JSON. ``texts`` defaults to the built-in ones.

    Adds ``rows`` where texts have some: by text what was read of them (``Rows.to_dict``).
    """
    opened = open_model(model, dtype, device, trust_remote_code)
    longest = longest_window(opened.model.config)
    if window > longest:
        raise UserError(f"--window {window} is longer than the model takes: give at most {longest}")
    rows: dict[str, Rows] = {}
    windows = eval_windows(
        opened.tokenizer,
        texts or builtin_texts(),
        window,
        max_windows,
        column=text_column,
        embeddings=embedding_rows(opened.model),
        read=rows,
    )
    expected = structure = None
    if reference is not None:
        other = open_model(reference, dtype, device, trust_remote_code)
        if other.contents is not None:
            raise UserError(f"{reference} is a packed checkpoint: --reference takes the full-precision model")
        if other.tokenizer.get_vocab() != opened.tokenizer.get_vocab():
            raise UserError(f"{reference} has another vocabulary than {model}: give the model that it was made from")
        expected, structure = other.model, find_structure(other.model)
        if _experts_paths(opened) != [layer.experts.path for _, layer in structure.moe_layers if layer.experts]:
            raise UserError(f"{reference} has other experts than {model}: give the model that it was made from")
    with (monitor or Monitor()).stage("evaluate", len(windows)) as tick:
        values = evaluate(opened.model, windows, reference=expected, structure=structure, progress=tick)
    return {
        "model": model,
        "stored_bytes": opened.stored_bytes,
        "expert_bits_nominal": opened.contents.expert_bits_nominal if opened.contents else None,
        "expert_bits_stored": opened.contents.expert_bits_stored if opened.contents else None,
        **values,
        **({"rows": {name: read.to_dict() for name, read in rows.items()}} if rows else {}),
    }
