"""Figures of an evaluation from predictions, and their standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemq.calibration.windows import concat_sources
from gemq.errors import UserError
from gemq.evaluation.evaluate import evaluate_paths
from gemq.evaluation.predictions import UNUSED_SLOT, chosen_experts
from gemq.evaluation.scoring import compare
from gemq.models.experts import ExpertsCall
from support.model_folders import edit_config, model_folder


class Fixed:
    """Predictions that were made before: logits [N, S, V] and one layer's experts [N, S, K]."""

    def __init__(self, logits: Tensor, experts: Tensor, batch: int) -> None:
        self.logits, self.experts = logits.split(batch), experts.split(batch)

    def predict(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self.logits[index], [self.experts[index]]


def test_figures_are_means_over_windows_with_their_standard_errors():
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(7, (5, 6), generator=random)
    windows = concat_sources([tokens[:3], tokens[3:]], ["a", "b"], [18, 12])
    p, q = (torch.randn(5, 6, 7, generator=random) for _ in range(2))
    experts = torch.tensor([0, 1]).expand(5, 6, 2).clone()
    others = experts.clone()
    others[0, :3, 1] = 2  # half of what the first window's first half chose
    reference, model = Fixed(p, experts, 2), Fixed(q, others.flip(-1), 2)

    values = compare(windows, list(tokens.split(2)), model, reference)

    log_p, log_q = (x.double().log_softmax(-1)[:, :-1] for x in (p, q))
    token_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    kl = token_kl.mean(1)
    nll = -log_q.gather(2, tokens[:, 1:, None]).squeeze(-1).mean(1)
    top1 = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
    assert values["windows"] == 5
    assert values["tokens"] == 25
    assert values["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert values["mean_kl_stderr"] == pytest.approx(kl.std().item() / math.sqrt(5), rel=1e-5)
    assert values["kl_p99"] == pytest.approx(token_kl.flatten().quantile(0.99).item(), rel=1e-5)
    assert values["kl_p999"] == pytest.approx(token_kl.flatten().quantile(0.999).item(), rel=1e-5)
    assert values["top1_agreement"] == pytest.approx(top1.mean().item())
    assert values["top1_agreement_stderr"] == pytest.approx(top1.std().item() / math.sqrt(5))
    assert values["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    error = math.exp(nll.mean()) * nll.std().item() / math.sqrt(5)
    assert values["perplexity_stderr"] == pytest.approx(error, rel=1e-5)
    assert values["layers"] == [pytest.approx(1 - 0.25 / 5)]
    second = values["texts"]["b"]
    assert second["mean_kl"] == pytest.approx(kl[3:].mean().item(), rel=1e-5)
    assert second["mean_kl_stderr"] == pytest.approx(kl[3:].std().item() / math.sqrt(2), rel=1e-5)
    assert second["kl_p99"] == pytest.approx(token_kl[3:].flatten().quantile(0.99).item(), rel=1e-5)
    assert second["routing_agreement"] == 1


def test_one_window_has_no_standard_error():
    tokens = torch.tensor([[1, 2, 0]])
    logits = Fixed(torch.zeros(1, 3, 4), torch.zeros(1, 3, 1), 1)
    values = compare(concat_sources([tokens], ["a"], [3]), [tokens], logits, None)
    assert values["perplexity"] == pytest.approx(4)
    assert values["perplexity_stderr"] is None
    assert "mean_kl" not in values


def test_experts_that_are_given_a_row_of_every_token_choose_by_token():
    """Rows come expert after expert; an index past the last expert marks a row that is not used."""
    index = torch.tensor([[0], [2], [2], [1]])  # expert 0: token 0; expert 1: token 1; the others are not chosen
    call = ExpertsCall(torch.zeros(4, 8), index, torch.ones(4, 1), torch.zeros(0))
    chosen = chosen_experts(call, torch.zeros(1, 2, dtype=torch.long))
    assert chosen.tolist() == [[[0, UNUSED_SLOT], [UNUSED_SLOT, 1]]]


def test_a_model_that_cannot_be_run_is_refused_in_one_line(tmp_path):
    folder = model_folder(tmp_path / "model")
    edit_config(folder, num_experts_per_tok=9)  # the model has fewer experts
    text = tmp_path / "text.txt"
    text.write_text("some text " * 50)
    with pytest.raises(UserError, match=r"cannot be run \(.*\): correct its config.json"):
        evaluate_paths(folder, texts=[text], seq_len=16, max_windows=1)
