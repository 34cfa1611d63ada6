"""Prompts of the generation check, what models write after them, and the figures of what they wrote."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gemq.calibration.windows import concat_sources
from gemq.evaluation.continuations import (
    GREEDY,
    SAMPLED,
    Continuation,
    Prompt,
    Prompts,
    WrittenTexts,
    choose_prompts,
    write_texts,
)
from gemq.evaluation.generation_check import GenerationCheck
from gemq.evaluation.predictions import WholeModel
from support.families import VOCABULARY, tiny

BOS, EOS, USER, ANSWER = 1, 2, 3, 4
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
NEW = 6


@pytest.fixture
def tokenizer() -> Any:
    names = ["<pad>", "<bos>", "<end>", "<user>", "<answer>", "gemq-user-message"]
    words = [*names, *(f"w{index}" for index in range(len(names), VOCABULARY))]
    plain = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w6"))
    plain.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, extra_special_tokens=["<user>", "<answer>"], **special)


def prompts_of(*texts: list[int]) -> list[Prompt]:
    return [Prompt("text", tokens, tokens) for tokens in texts]


def write(model: Any, tokenizer: Any, prompts: list[Prompt], seed: int = 0, max_rows: int = 100) -> WrittenTexts:
    options: dict[str, Any] = {"new_tokens": NEW, "seed": seed, "max_rows": max_rows}
    return write_texts(model, tokenizer, prompts, **options, progress=lambda done, total: None)


# Prompts


def test_prompts_are_spread_evenly_over_texts_and_within_each(tokenizer):
    tokens = torch.arange(10, 10 + 4 * 9).view(4, 9)  # two segments of 4 tokens in each window
    windows = concat_sources([tokens[:3], tokens[3:]], ["long", "short"], [27, 9])
    chosen = choose_prompts(windows, tokenizer, 6, 4, VOCABULARY)
    assert [prompt.source for prompt in chosen.prompts] == ["long"] * 3 + ["short"] * 2
    assert [prompt.tokens[0] for prompt in chosen.prompts] == [10, 19, 28, 37, 41]
    assert all(prompt.tokens == prompt.text_tokens for prompt in chosen.prompts)
    assert (chosen.num_templated, chosen.has_unusable_template, chosen.longest) == (0, False, 4)


def test_prompts_go_into_the_chat_template_unless_they_hold_special_tokens(tokenizer):
    tokenizer.chat_template = TEMPLATE
    tokens = torch.tensor([[10, 11, 12], [13, EOS, 14]])
    chosen = choose_prompts(concat_sources([tokens], ["text"], [6]), tokenizer, 2, 3, VOCABULARY)
    assert [prompt.tokens for prompt in chosen.prompts] == [[USER, 10, 11, 12, EOS, ANSWER], [13, EOS, 14]]
    assert [prompt.text_tokens for prompt in chosen.prompts] == tokens.tolist()
    assert (chosen.num_templated, chosen.has_unusable_template, chosen.longest) == (1, False, 6)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    chosen = choose_prompts(concat_sources([tokens], ["text"], [6]), tokenizer, 2, 3, VOCABULARY)
    assert (chosen.num_templated, chosen.has_unusable_template) == (0, True)


# Writing


@torch.no_grad()
def test_greedy_texts_are_those_of_a_model_without_cache(tokenizer):
    model = tiny("olmoe")
    prompts = prompts_of([11, 12, 13], [14, 15, 16, 17, 18], [19, 20, 21, 22])
    for prompt, text in zip(prompts, write(model, tokenizer, prompts).by_mode[GREEDY], strict=True):
        ids = list(prompt.tokens)
        while len(ids) < len(prompt.tokens) + NEW and ids[-1] != EOS:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text.tokens == ids[len(prompt.tokens) :]
        assert text.is_ended == (ids[-1] == EOS)


def test_sampled_texts_depend_on_the_seed_and_not_on_what_runs_in_parallel(tokenizer):
    model = tiny("olmoe")
    prompts = prompts_of([11, 12, 13], [14, 15, 16, 17, 18], [11, 12, 13])
    written = write(model, tokenizer, prompts)
    torch.manual_seed(1)
    assert write(model, tokenizer, prompts, max_rows=2) == written
    assert write(model, tokenizer, prompts, max_rows=1) == written
    assert write(model, tokenizer, prompts, seed=1).by_mode[SAMPLED] != written.by_mode[SAMPLED]
    first, _, third = written.by_mode[SAMPLED]
    assert first != third  # the same prompt, other random numbers
    assert written.by_mode[GREEDY] != written.by_mode[SAMPLED]


def test_a_text_ends_with_its_first_end_token(tokenizer):
    model = tiny("olmoe")
    prompts = prompts_of([11, 12, 13], [14, 15, 16, 17, 18])
    tokens = write(model, tokenizer, prompts).by_mode[GREEDY][0].tokens
    model.generation_config.eos_token_id = [EOS, tokens[3]]
    text = write(model, tokenizer, prompts).by_mode[GREEDY][0]
    length = tokens.index(tokens[3])
    assert text == Continuation(tokens[: length + 1], True)
    assert text.text_tokens == tokens[:length]


# Figures


def check_of(prompts: list[Prompt], tokenizer: Any, **written: WrittenTexts) -> GenerationCheck:
    subject: Any = types.SimpleNamespace(source=types.SimpleNamespace(tokenizer=tokenizer))
    return GenerationCheck(subject, subject, Prompts(prompts, 0, False), NEW, [], dict(written))


@torch.no_grad()
def test_kl_is_that_of_the_tokens_that_the_model_wrote(tokenizer):
    model, reference = tiny("olmoe", seed=1), tiny("olmoe")
    prompts = prompts_of([11, 12, 13], [14, 15, 16, 17, 18])
    written = write(model, tokenizer, prompts)
    cut = written.by_mode[GREEDY][0].tokens[:2]
    written.by_mode[GREEDY][0] = Continuation(cut, True)  # what follows the end does not count
    check = check_of(prompts, tokenizer, model=written)
    batches = check.batches(2 * check.seq_len)
    assert [len(batch) for batch in batches] == [2, 2]
    predictions = [WholeModel(m, [torch.zeros(1, 2, dtype=torch.long), *batches], ()) for m in (model, reference)]
    check.measure(*predictions, range(1, 3), lambda done=None, total=None: None)
    values = check.values()["model"]
    for mode in (GREEDY, SAMPLED):
        token_kl = []
        for prompt, text in zip(prompts, written.by_mode[mode], strict=True):
            ids = torch.tensor([[*prompt.tokens, *text.tokens]])
            log_q, log_p = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (model, reference))
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            token_kl.append(kl[len(prompt.tokens) - 1 : -1])
        assert values[mode]["mean_kl"] == pytest.approx(torch.cat(token_kl).mean().item(), rel=1e-4)
        assert values[mode]["mean_kl_stderr"] > 0


def test_figures_count_loops_and_early_ends(tokenizer):
    loop = Continuation([10, 11, 12, *[13, 14] * 12], False)
    ended_loop = Continuation([*[13, 14] * 12, EOS], True)
    plain = Continuation(list(range(10, 30)), False)
    ended = Continuation([10, 11, EOS], True)
    texts = {GREEDY: [loop, ended_loop, plain, ended], SAMPLED: [plain] * 4}
    check = check_of(prompts_of([11], [12], [13], [14]), tokenizer, model=WrittenTexts(texts, ""))
    values = check.values()
    assert values["model"][GREEDY] == {
        "repetition_rate": pytest.approx((19 / 24 + 19 / 21 + 0) / 3),  # the last text has no 4-gram
        "loops": 1,
        "loop_share": 0.25,
        "ended": 2,
        "ended_share": 0.5,
        "ended_mean_tokens": 13,
    }
    assert values["model"][SAMPLED]["ended_mean_tokens"] is None
    row = values["texts"][3]
    assert (row["source"], row["prompt"]) == ("text", "w14")
    assert row["model"][GREEDY]["text"] == "w10 w11"
    assert values["texts"][0]["model"][GREEDY]["loop_period"] == 2
    assert "reference" not in values
