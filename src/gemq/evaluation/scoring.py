"""Scores of predictions: perplexity and, against a reference, KL divergence, top-1 and routing agreement.

Windows do not overlap, the first token of a window is not scored, and no BOS token is added. Logits are compared in
float32. All windows have the same length, so a mean over windows is also the mean over all scored tokens. Standard
errors are those of the mean over windows. The KL of every token is stored, 4 bytes each, so that quantiles are exact.

Shapes: N windows, B windows in a batch, S tokens in a window, L layers with experts, K chosen experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemq.allocation.divergence import position_chunks
from gemq.calibration.windows import Windows
from gemq.evaluation.predictions import UNUSED_SLOT, Predictions

MAX_LOG_PERPLEXITY = 700.0
"""Larger values overflow ``math.exp``."""

KL_QUANTILES = {"kl_p99": 0.99, "kl_p999": 0.999}
"""Reported quantiles of the KL over tokens, by their key in the results."""


@dataclass(frozen=True)
class WindowMetrics:
    """Metrics of every window, float64 except ``token_kl``. Values of a window are means over its scored tokens.

    Without a reference the last four are None.

    Attributes:
        nll: negative log likelihood in nats, [N]
        reference_nll: the same of the reference, [N]
        token_kl: KL(reference || model) of each scored token in nats, float32 [N, S - 1]
        top1: share of tokens whose most likely next token is the reference's, [N]
        routing: share of the reference's chosen experts that the model chose as well, over all tokens, [N, L]
    """

    nll: Tensor
    reference_nll: Tensor | None = None
    token_kl: Tensor | None = None
    top1: Tensor | None = None
    routing: Tensor | None = None

    def summary(self, selected: Tensor, scored_tokens: int) -> dict[str, Any]:
        """Returns means and standard errors over the selected windows, and quantiles over their tokens.

        Args:
            selected: which windows to include, bool [N]
            scored_tokens: number of scored tokens per window
        """
        num_windows = int(selected.sum())
        nll, error = _mean_and_stderr(self.nll[selected])
        perplexity = _perplexity(nll)
        values: dict[str, Any] = {
            "windows": num_windows,
            "tokens": num_windows * scored_tokens,
            "perplexity": perplexity,
            "perplexity_stderr": None if error is None else perplexity * error,
        }
        if self.reference_nll is not None:
            values["reference_perplexity"] = _perplexity(self.reference_nll[selected].mean().item())
        if self.token_kl is not None and self.top1 is not None and self.routing is not None:
            token_kl = self.token_kl[selected]
            values["mean_kl"], values["mean_kl_stderr"] = _mean_and_stderr(token_kl.double().mean(1))
            for key, share in KL_QUANTILES.items():
                values[key] = float(np.quantile(token_kl.numpy(), share))
            values["top1_agreement"], values["top1_agreement_stderr"] = _mean_and_stderr(self.top1[selected])
            routing = self.routing[selected]
            values["routing_agreement"] = routing.mean().item() if routing.shape[1] else None
        return values


def _perplexity(nll: float) -> float:
    """Returns the perplexity of a mean negative log likelihood in nats."""
    return math.exp(min(nll, MAX_LOG_PERPLEXITY))


def _mean_and_stderr(values: Tensor) -> tuple[float, float | None]:
    """Returns the mean of [n] values and its standard error, which is None for a single value."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def compare(
    windows: Windows,
    batches: Sequence[Tensor],
    model: Predictions,
    reference: Predictions | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores the predictions of ``batches`` and returns the values that ``evaluate`` documents.

    Args:
        windows: all windows
        batches: token ids [B, S] of consecutive windows
        model: predictions to score
        reference: predictions to compare with
    """
    scores: list[_Score] = []
    agreements: list[list[float]] = []
    for index, ids in enumerate(batches):
        # The model comes first: it may run layers now, and then no logits of the reference are in memory yet.
        logits, experts = model.predict(index)
        if reference is None:
            scores += _score_batch(logits, None, ids)
        else:
            reference_logits, reference_experts = reference.predict(index)
            scores += _score_batch(logits, reference_logits, ids)
            agreements += _routing_agreements(experts, reference_experts)
        if progress:
            progress(len(scores), len(windows))

    metrics = _collect_metrics(scores, agreements if reference is not None else None)
    scored_tokens = windows.seq_len - 1
    all_windows = torch.ones(len(windows), dtype=torch.bool)
    values = metrics.summary(all_windows, scored_tokens)
    values["texts"] = {
        name: metrics.summary(windows.source == source, scored_tokens) for source, name in enumerate(windows.names)
    }
    values["layers"] = [] if metrics.routing is None else metrics.routing.mean(0).tolist()
    return values


class _Score(NamedTuple):
    """Scores of one window. The last three are 0 and empty without a reference.

    Attributes:
        nll: mean negative log likelihood
        reference_nll: the same of the reference
        top1: share of tokens whose most likely next token is the reference's
        token_kl: KL of each scored token, float32 [S - 1] on the CPU
    """

    nll: float
    reference_nll: float
    top1: float
    token_kl: Tensor


def _score_batch(logits: Tensor, reference: Tensor | None, ids: Tensor) -> list[_Score]:
    """Scores the windows ``ids`` [B, S] from the logits [B, S, V] of the model and of the reference."""
    ids = ids.to(logits.device)
    scores = []
    for row, window_ids in enumerate(ids):
        window_reference = None if reference is None else reference[row]
        scores.append(_score_window(logits[row], window_reference, window_ids))
    return scores


def _score_window(logits: Tensor, reference: Tensor | None, ids: Tensor) -> _Score:
    """Scores the window ``ids`` [S] from the logits [S, V] of the model and of the reference."""
    nll = reference_nll = top1 = 0.0
    token_kl = [torch.empty(0)]
    scored = len(ids) - 1
    for rows in position_chunks(scored):
        log_q = logits[rows].float().log_softmax(-1)
        next_tokens = ids[rows.start + 1 : rows.stop + 1, None]
        nll -= log_q.gather(1, next_tokens).sum().item()
        if reference is not None:
            log_p = reference[rows].float().log_softmax(-1)
            reference_nll -= log_p.gather(1, next_tokens).sum().item()
            token_kl.append(_token_kl(log_p, log_q))
            top1 += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    return _Score(nll / scored, reference_nll / scored, top1 / scored, torch.cat(token_kl))


def window_kl(logits: Tensor, reference: Tensor, positions: slice) -> Tensor:
    """Returns KL(reference || model) at consecutive positions of one window.

    Args:
        logits: of the model, [S, V]
        reference: logits of the reference, [S, V]
        positions: of the window, with start and stop

    Returns:
        float32 [positions] on the CPU.
    """
    token_kl = [torch.empty(0)]
    for chunk in position_chunks(positions.stop - positions.start):
        rows = slice(positions.start + chunk.start, positions.start + chunk.stop)
        token_kl.append(_token_kl(reference[rows].float().log_softmax(-1), logits[rows].float().log_softmax(-1)))
    return torch.cat(token_kl)


def _token_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(p || q) of each position in nats, float32 [n] on the CPU, from log probabilities [n, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).cpu()


def _routing_agreements(experts: Sequence[Tensor], reference: Sequence[Tensor]) -> list[list[float]]:
    """Returns the routing agreement of each window and layer, from the experts [B, S, K] that each layer chose."""
    by_layer = []
    for layer_experts, layer_reference in zip(experts, reference, strict=True):
        windows = zip(layer_experts, layer_reference, strict=True)
        by_layer.append([_routing_agreement(chosen, expected) for chosen, expected in windows])
    return [list(window) for window in zip(*by_layer, strict=True)]


def _routing_agreement(chosen: Tensor, expected: Tensor) -> float:
    """Mean over tokens of the share of the ``expected`` experts [S, K] that are in ``chosen``, in any order."""
    is_used = expected != UNUSED_SLOT
    is_chosen = (expected.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1) & is_used
    return (is_chosen.sum(-1) / is_used.sum(-1).clamp_min(1)).mean().item()


def _collect_metrics(scores: Sequence[_Score], agreements: Sequence[Sequence[float]] | None) -> WindowMetrics:
    """Stacks the scores and agreements of all windows. ``agreements`` is None without a reference."""
    nll = torch.tensor([score.nll for score in scores], dtype=torch.float64)
    if agreements is None:
        return WindowMetrics(nll)
    reference_nll = torch.tensor([score.reference_nll for score in scores], dtype=torch.float64)
    token_kl = torch.stack([score.token_kl for score in scores])
    top1 = torch.tensor([score.top1 for score in scores], dtype=torch.float64)
    routing = torch.tensor(agreements, dtype=torch.float64).view(len(scores), -1)
    return WindowMetrics(nll, reference_nll, token_kl, top1, routing)
