"""How good a model is: perplexity and, against a full-precision reference, KL, top-1 and routing agreement.

Windows do not overlap, each window's first token is not scored, no BOS is added. Logits are compared in float32. Every
figure is a mean over windows, which are equally long, and so over all tokens of all texts; its standard error is that
of this mean.

Shapes: N windows, B windows in a batch, S tokens in a window, L layers with experts, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemq.allocation.divergence import chunks, divergence
from gemq.assets import builtin_texts
from gemq.calibration.rows import Rows
from gemq.calibration.windows import Windows, eval_windows
from gemq.checkpoint.contents import Contents, inspect_checkpoint
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.load import load
from gemq.errors import UserError
from gemq.evaluation.predictions import UNUSED, ModelFiles, Predictions, WholeModel, batch_tokens, start_all
from gemq.models.source import DTYPES, Source, longest_window
from gemq.models.structure import Structure, find_structure
from gemq.runtime.device import pick_device
from gemq.runtime.memory import Memory
from gemq.runtime.progress import Monitor

BATCH_TOKENS = 4096
"""Tokens of the windows that run together, at most, if that is a window or more."""


@dataclass(frozen=True)
class WindowFigures:
    """Figures by window, float64: means over the window's scored tokens, in nats.

    nll:    [N]
    kl:     [N] of KL(reference || model)
    top1:   [N] share of tokens whose likeliest next token is the reference's
    routed: [N, L] share of the reference's chosen experts that the model chose as well, over all tokens
    Without a reference the last three are None.
    """

    nll: Tensor
    kl: Tensor | None = None
    top1: Tensor | None = None
    routed: Tensor | None = None

    def summary(self, chosen: Tensor, tokens: int) -> dict[str, Any]:
        """Means and standard errors over the ``chosen`` windows (bool [N]), of ``tokens`` scored tokens each."""
        nll, error = _mean(self.nll[chosen])
        perplexity = math.exp(min(nll, 700.0))
        values: dict[str, Any] = {
            "windows": int(chosen.sum()),
            "tokens": int(chosen.sum()) * tokens,
            "perplexity": perplexity,
            "perplexity_stderr": None if error is None else perplexity * error,
        }
        if self.kl is not None and self.top1 is not None and self.routed is not None:
            values["mean_kl"], values["mean_kl_stderr"] = _mean(self.kl[chosen])
            values["top1_agreement"], values["top1_agreement_stderr"] = _mean(self.top1[chosen])
            routed = self.routed[chosen]
            values["routing_agreement"] = routed.mean().item() if routed.shape[1] else None
        return values


def _mean(values: Tensor) -> tuple[float, float | None]:
    """The mean of [n] values and its standard error, which one value does not have."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    reference: nn.Module | None = None,
    structure: Structure | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity over ``windows`` of a loaded model, with the figures against ``reference`` when it is given.

    structure: the reference's, whose experts' paths hold for both models; without it routing is not compared

    Returns ``windows``, ``tokens``, ``perplexity``, ``mean_kl``, ``top1_agreement``, ``routing_agreement``, the
    standard errors of the first three figures, ``texts`` (the same by source) and ``layers`` (routing agreement per
    layer with experts), as ``gemq eval --json`` prints them.
    """
    batches = [windows.tokens[part] for part in windows.batches(batch_tokens)]
    paths = [x.experts.path for _, x in structure.moe_layers if x.experts] if structure and reference else []
    expected = None if reference is None else WholeModel(reference, batches, paths)
    return compare(windows, batches, WholeModel(model, batches, paths), expected, progress)


def compare(
    windows: Windows,
    batches: Sequence[Tensor],
    model: Predictions,
    reference: Predictions | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """``evaluate`` for predictions of ``batches``, token ids [B, S] of consecutive ``windows``."""
    figures: list[tuple[float, ...]] = []
    routed: list[list[float]] = []
    for number, ids in enumerate(batches):
        logits, choices = model.batch(number)  # first, since it may run layers: then only one batch's logits are held
        expected, expected_choices = (None, []) if reference is None else reference.batch(number)
        for row, tokens in enumerate(ids):
            figures.append(_window(logits[row], None if expected is None else expected[row], tokens.to(logits.device)))
            if reference is not None:
                routed.append([_agreement(a[row], b[row]) for a, b in zip(choices, expected_choices, strict=True)])
        if progress:
            progress(len(figures), len(windows))
    nll, *others = torch.tensor(figures, dtype=torch.float64).unbind(1)
    layers = torch.tensor(routed, dtype=torch.float64).view(len(routed), -1) if routed else None
    found = WindowFigures(nll, others[0], others[1], layers) if others else WindowFigures(nll)
    every, scored = torch.ones(len(windows), dtype=torch.bool), windows.window - 1
    values = found.summary(every, scored)
    values["texts"] = {name: found.summary(windows.source == i, scored) for i, name in enumerate(windows.names)}
    values["layers"] = layers.mean(0).tolist() if layers is not None else []
    return values


def _window(logits: Tensor, reference: Tensor | None, ids: Tensor) -> tuple[float, ...]:
    """NLL, and KL and top-1 against a reference, of one window: means over its scored tokens.

    Logits [S, V] of the model and of the reference; ids [S].
    """
    nll = kl = top1 = 0.0
    for rows in chunks(len(ids) - 1):
        log_q = logits[rows].float().log_softmax(-1)
        nll -= log_q.gather(1, ids[rows.start + 1 : rows.stop + 1, None]).sum().item()
        if reference is not None:
            log_p = reference[rows].float().log_softmax(-1)
            kl += divergence(log_p, log_q).item()
            top1 += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    scored = len(ids) - 1
    return (nll / scored,) if reference is None else (nll / scored, kl / scored, top1 / scored)


def _agreement(chosen: Tensor, expected: Tensor) -> float:
    """Mean over tokens of the share of ``expected`` [S, K] that is also in ``chosen``, whatever the order."""
    used = expected != UNUSED
    both = (expected.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1) & used
    return (both.sum(-1) / used.sum(-1).clamp_min(1)).mean().item()


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
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """``evaluate`` for models on disk, in bounded memory: what ``gemq eval`` prints as JSON.

    Adds ``rows`` where texts have some: by text what was read of them (``Rows.to_dict``).

    texts: files; by default the built-in ones
    text_column: of rows, see ``eval_windows``
    gpu_memory, host_memory: bytes that may be held at most, by default 90 % of what is free; they decide where layers
        and activations are, never what comes out
    Raises UserError, before any weight is read, when something cannot be evaluated.
    """
    picked = pick_device(device)
    subject = ModelFiles.open(model, dtype, trust_remote_code)
    longest = longest_window(subject.config)
    if window > longest:
        raise UserError(f"--window {window} is longer than the model takes: give at most {longest}")
    models = [subject]
    if reference is not None:
        models = [_reference_of(subject, ModelFiles.open(reference, dtype, trust_remote_code)), subject]
    rows: dict[str, Rows] = {}
    windows = eval_windows(
        subject.source.tokenizer,
        texts or builtin_texts(),
        window,
        max_windows,
        column=text_column,
        embeddings=subject.embeddings,
        read=rows,
    )
    batches = [windows.tokens[part] for part in windows.batches(batch_tokens(models, BATCH_TOKENS))]
    monitor = monitor or Monitor()
    with tempfile.TemporaryDirectory(prefix="gemq-eval-") as directory:
        memory = Memory.bounded(picked, gpu_memory, host_memory, Path(directory))
        with memory.enforced():
            (*expected, found), stored_bytes = start_all(models, memory, batches, monitor)
            with monitor.stage("score", len(windows)) as tick:
                values = compare(windows, batches, found, expected[0] if expected else None, tick)
    if not math.isfinite(values["perplexity"]):
        raise UserError(f"{model} predicts no numbers: its weights hold NaN or infinity, or overflow in {dtype}")
    contents = subject.contents
    return {
        "model": model,
        "stored_bytes": stored_bytes,
        "expert_bits_nominal": contents.expert_bits_nominal if contents else None,
        "expert_bits_stored": contents.expert_bits_stored if contents else None,
        **values,
        **({"rows": {name: read.to_dict() for name, read in rows.items()}} if rows else {}),
    }


def _reference_of(subject: ModelFiles, reference: ModelFiles) -> ModelFiles:
    """The reference, if ``subject`` can be compared with it. Raises UserError if not."""
    name = reference.name
    if reference.contents is not None:
        raise UserError(f"{name} is a packed checkpoint: --reference takes the full-precision model")
    if reference.structure is None:
        find_structure(reference.source.skeleton())  # says why
    if reference.source.tokenizer.get_vocab() != subject.source.tokenizer.get_vocab():
        raise UserError(f"{name} has another vocabulary than {subject.name}: give the model that it was made from")
    if reference.vocabulary != subject.vocabulary:
        raise UserError(f"{name} has other logits than {subject.name}: give the model that it was made from")
    if reference.experts != subject.experts:
        raise UserError(f"{name} has other experts than {subject.name}: give the model that it was made from")
    return reference
