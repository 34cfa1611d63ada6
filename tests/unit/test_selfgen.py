"""Windows that a model writes itself."""

import dataclasses
import types

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from gemq.calibration.self_generation import (
    Openings,
    WindowPlan,
    even_batch_size,
    generate_windows,
    gpu_batch_size,
    sample,
)
from gemq.calibration.vocabulary import Vocabulary
from gemq.errors import UserError
from support.families import tiny

BOS, EOS, PAD, TURN = 0, 1, 2, 3
WORDS = 16
ROWS = 24  # of the embedding: eight of them padding
WINDOW = 32
# Some templates write today's date into the conversation.
TEMPLATE = (
    "{% for m in messages %}user {{ m.content }} <turn>{% endfor %}"
    "{% if add_generation_prompt %} model {{ strftime_now('%d %b %Y') }}{% endif %}"
)


def make_tokenizer(**special):
    names = ["<bos>", "<eos>", "<pad>", "<turn>", "user", "model", "01"]
    vocabulary = {name: i for i, name in enumerate([*names, *(f"w{i}" for i in range(len(names), WORDS))])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="w15"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, extra_special_tokens=["<turn>"], **special)


@pytest.fixture
def tokenizer():
    return make_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


class FixedLogits(torch.nn.Module):
    """A model whose next token never depends on anything."""

    def __init__(self, logits, **tokens):
        super().__init__()
        self.logits = logits
        values = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens}
        self.config = types.SimpleNamespace(vocab_size=len(logits), num_hidden_layers=1, hidden_size=8, **values)
        self.config.get_text_config = lambda: self.config
        self.device = torch.device("cpu")

    def forward(self, input_ids, past_key_values, use_cache):
        cache = DynamicCache() if past_key_values is None else past_key_values
        return types.SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1), past_key_values=cache)


def fixed(weights, **tokens):
    """A FixedLogits model of unnormalised probabilities {token: weight}; the other tokens have none."""
    logits = torch.full((ROWS,), -torch.inf)
    for token, weight in weights.items():
        logits[token] = torch.tensor(float(weight)).log()
    return FixedLogits(logits, **tokens)


@pytest.fixture(scope="module")
def olmoe():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=ROWS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return OlmoeForCausalLM(config).eval()


def write(model, tokenizer, count=6, seed=0, seq_len=WINDOW, **options):
    """One plan, and its tokens."""
    generated = generate_windows(model, tokenizer, WindowPlan(count, seed), seq_len=seq_len, **options)
    return dataclasses.replace(generated, tokens=generated.tokens[0])


@pytest.mark.parametrize("bos", [BOS, None])
def test_plans_written_in_one_call_equal_those_written_separately(tokenizer, bos):
    """Batches may contain windows of two plans."""
    model = fixed({4: 3, 5: 2, 6: 2, EOS: 1}, bos_token_id=bos, eos_token_id=EOS)
    plans = [WindowPlan(5, 3), WindowPlan(3, 8, Openings(torch.tensor([4, 5, 6, 7]), random=0.5)), WindowPlan(0, 1)]
    one_call = generate_windows(model, tokenizer, *plans, seq_len=WINDOW, batch=4)
    separate_calls = [generate_windows(model, tokenizer, plan, seq_len=WINDOW) for plan in plans]
    assert [len(tokens) for tokens in one_call.tokens] == [5, 3, 0]
    for tokens, separate in zip(one_call.tokens, separate_calls, strict=True):
        assert torch.equal(tokens, separate.tokens[0])
    assert one_call.documents == sum(separate.documents for separate in separate_calls)


def test_shape_bos_and_masked_tokens(olmoe, tokenizer):
    generated = write(olmoe, tokenizer, count=40)
    assert generated.tokens.shape == (40, WINDOW)
    assert generated.tokens.dtype == torch.int64
    assert (generated.tokens[:, 0] == BOS).all()
    assert generated.tokens.max() < WORDS
    assert PAD not in generated.tokens
    assert (generated.chat_windows, generated.chat_fallbacks) == (0, 0)


def test_padding_rows_are_never_sampled_however_likely(tokenizer):
    generated = write(fixed({4: 1, 5: 1, PAD: 1e6, WORDS: 1e6, ROWS - 1: 1e6}, pad_token_id=PAD), tokenizer)
    assert set(generated.tokens[:, 1:].unique().tolist()) == {4, 5}


def test_pad_that_ends_documents_is_sampled(tokenizer):
    generated = write(fixed({4: 1, PAD: 1}, bos_token_id=BOS, eos_token_id=PAD, pad_token_id=PAD), tokenizer)
    assert PAD in generated.tokens


def test_seed_decides_and_global_state_does_not(olmoe, tokenizer):
    torch.manual_seed(1)
    generated = write(olmoe, tokenizer, count=6, batch=4)
    torch.manual_seed(2)
    longer = write(olmoe, tokenizer, count=9, batch=3)
    assert torch.equal(generated.tokens[:3], longer.tokens[:3])  # window i is fixed by (seed, i)
    assert torch.equal(generated.tokens, write(olmoe, tokenizer, count=6, batch=4).tokens)
    assert not torch.equal(generated.tokens[:2], generated.tokens[4:])
    assert not torch.equal(generated.tokens, write(olmoe, tokenizer, count=6, batch=4, seed=1).tokens)


def test_model_is_left_as_it_was(olmoe, tokenizer):
    olmoe.set_experts_implementation("eager")
    olmoe.generation_config.forced_eos_token_id = 9
    olmoe.generation_config.suppress_tokens = [4, 5, 6, 7]
    olmoe.train()
    try:
        generated = write(olmoe, tokenizer, count=20)
        assert olmoe.training
        assert olmoe.config._experts_implementation == "eager"
        assert {4, 5, 6, 7} <= set(generated.tokens.unique().tolist())  # the generation config has no influence
    finally:
        olmoe.eval()
        olmoe.generation_config.forced_eos_token_id = olmoe.generation_config.suppress_tokens = None
        olmoe.set_experts_implementation("grouped_mm")


def test_cached_steps_see_what_a_full_forward_sees(olmoe, tokenizer):
    steps = []
    hook = olmoe.lm_head.register_forward_hook(lambda module, args, out: steps.append(out[:, -1].clone()))
    try:
        generated = write(olmoe, tokenizer, count=3)
    finally:
        hook.remove()
    with torch.no_grad():
        full = olmoe(generated.tokens).logits[:, :-1]
    torch.testing.assert_close(torch.stack(steps, dim=1), full, rtol=1e-4, atol=1e-4)


def test_static_steps_write_the_same_tokens(olmoe, tokenizer):
    """As on a GPU, where a graph holds them: batch after batch over one cache, the last one smaller."""
    steps = write(olmoe, tokenizer, count=7, batch=3, static=True)
    plain = write(olmoe, tokenizer, count=7, batch=3)
    assert torch.equal(steps.tokens, plain.tokens)
    assert steps.documents == plain.documents
    assert steps.eager_windows == 0


def test_models_without_static_steps_write_the_same_windows(tokenizer):
    model = tiny("nemotron_h")  # its state is more than keys and values
    generated = write(model, tokenizer, count=3, batch=2, static=True)
    assert torch.equal(generated.tokens, write(model, tokenizer, count=3, batch=2).tokens)
    assert generated.eager_windows == 3


def test_bos_follows_an_end_token(tokenizer):
    # end tokens of the list and of the tokenizer count
    ends = [EOS, 9]
    generated = write(fixed({4: 5, EOS: 1, 9: 1}, bos_token_id=BOS, eos_token_id=[9]), tokenizer)
    previous, next_tokens = generated.tokens[:, :-1], generated.tokens[:, 1:]
    ended = torch.isin(previous, torch.tensor(ends))
    assert ended.any()
    assert torch.equal(next_tokens == BOS, ended)
    assert generated.documents == 6 + int(ended.sum())


def test_end_token_that_is_bos_is_the_next_beginning():
    tokenizer = make_tokenizer(bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")
    generated = write(fixed({EOS: 1}, eos_token_id=EOS), tokenizer)
    assert (generated.tokens == EOS).all()  # nothing is inserted after it
    assert generated.documents == 6 * (WINDOW - 1)  # an end token at the end of a window begins no document


def test_without_bos_documents_begin_with_a_random_plain_token():
    tokenizer = make_tokenizer(eos_token="<eos>", pad_token="<pad>")
    generated = write(fixed({EOS: 1}, eos_token_id=EOS), tokenizer, count=50)
    assert (generated.tokens[:, 1::2] == EOS).all()
    starts = generated.tokens[:, 0::2]
    assert set(starts.unique().tolist()) == set(range(WORDS)) - {EOS, PAD, TURN}
    assert generated.documents == 50 * WINDOW // 2
    assert not torch.equal(starts, write(fixed({EOS: 1}), tokenizer, count=50, seed=1).tokens[:, 0::2])


def test_every_second_window_opens_with_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    model = fixed({10: 4, TURN: 1}, bos_token_id=BOS, eos_token_id=[EOS, TURN])
    generated = write(model, tokenizer, count=7, batch=3)
    user, answer = (tokenizer.convert_tokens_to_ids(word) for word in ("user", "model"))
    assert generated.tokens[:, 0].tolist() == [BOS, user, BOS, user, BOS, user, BOS]
    assert (generated.chat_windows, generated.chat_fallbacks) == (3, 0)
    for row, tokens in enumerate(generated.tokens.tolist()):
        turns = [i for i, token in enumerate(tokens[:-4]) if token == TURN]
        assert turns
        for number, i in enumerate(turns):
            # The first end of a chat window ends the user's turn, the later ones the conversation.
            follow = [answer, 6, WORDS - 1, WORDS - 1] if row % 2 and number == 0 else [BOS]
            assert tokens[i + 1 : i + 1 + len(follow)] == follow


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.nothing.at_all }}",
        "no message",
        "{{ messages[0].content }} first",
        "{% for i in range(40) %}user {% endfor %}{{ messages[0].content }}",
    ],
)
def test_unusable_chat_templates_are_counted(tokenizer, template):
    tokenizer.chat_template = template
    generated = write(fixed({4: 1}, bos_token_id=BOS), tokenizer, count=5)
    assert (generated.tokens[:, 0] == BOS).all()
    assert (generated.chat_windows, generated.chat_fallbacks) == (0, 2)


def test_model_without_cache_is_refused(tokenizer):
    model = fixed({4: 1})
    model.forward = lambda **inputs: types.SimpleNamespace(logits=torch.zeros(6, 1, ROWS), past_key_values=None)
    with pytest.raises(UserError, match="give --calibration FILE"):
        write(model, tokenizer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"bos_token_id": "x"}, "bos_token_id of the model is 'x': give a number"),
        ({"eos_token_id": [1, True]}, "eos_token_id of the model is True: give a number"),
        ({"bos_token_id": ROWS}, f"bos_token_id of the model is {ROWS}, and its vocabulary has {ROWS} tokens"),
    ],
)
def test_special_tokens_that_are_no_tokens_are_refused(tokens, message):
    logits = torch.zeros(ROWS)
    with pytest.raises(UserError, match=message):
        Vocabulary.from_model(FixedLogits(logits, **tokens), make_tokenizer())


@pytest.mark.parametrize(
    ("max_size", "expected"),
    [(-3, 29), (0, 29), (29, 29), (31, 31), (42, 42), (72, 72), (1000, 72)],
)
def test_batches_grow_with_the_memory_of_a_gpu(max_size, expected):
    """144 windows: batches of at least 29, as large as memory allows, but at least two batches."""
    assert gpu_batch_size(144, 29, max_size) == expected


def test_few_windows_stay_in_one_batch():
    assert gpu_batch_size(16, 29, 1000) == 29
    assert gpu_batch_size(58, 29, 1000) == 29


def test_batches_are_even():
    assert [even_batch_size(144, max_size) for max_size in (29, 64, 72, 1000)] == [29, 48, 72, 144]
    assert [even_batch_size(count, 4) for count in (0, 1, 5, 9)] == [1, 1, 3, 3]


def test_progress_counts_tokens(tokenizer):
    seen = []
    write(fixed({4: 1}), tokenizer, count=3, batch=2, progress=lambda *progress: seen.append(progress))
    assert seen[-1] == (3 * WINDOW, 3 * WINDOW)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_sampling_follows_the_distribution(tokenizer):
    weights = {4: 0.5, 5: 0.3, 6: 0.15, 7: 0.04, 8: 0.01}
    generated = write(fixed(weights), tokenizer, count=200, seq_len=201)
    drawn = generated.tokens[:, 1:]
    total = drawn.numel()
    chi_square = sum(
        (int((drawn == token).sum()) - total * weight) ** 2 / (total * weight) for token, weight in weights.items()
    )
    assert chi_square < 23.5  # the 0.9999 quantile at 4 degrees of freedom
    # Neighbours in a window are independent: the chance of a pair is the product.
    pairs = ((drawn[:, :-1] == 4) & (drawn[:, 1:] == 5)).double().mean().item()
    assert abs(pairs - 0.15) < 0.01


def test_sample_never_takes_what_has_no_probability():
    logits = torch.full((5000, 9), -torch.inf)
    logits[:, [2, 5]] = torch.tensor([0.0, -12.0])
    drawn = sample(logits, torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert set(drawn.unique().tolist()) <= {2, 5}
