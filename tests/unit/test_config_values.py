"""What is read from configurations: layers with values of their own, and rotary factors that change with the length."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, OlmoeConfig, PhimoeConfig

from gemq.calibration.generation_steps import Stepper
from gemq.calibration.self_generation import batch_size
from gemq.decoding.decoder import Decoder, Unsupported
from gemq.models.cache_size import estimated_cache
from gemq.models.config_values import embedding_rows, experts_per_token, layer_configs, rotary_limit
from support.families import tiny_config, tokens

torch.set_num_threads(1)
LIMIT = 12
DIMENSIONS = 8
FACTORS = {"short_factor": [1.0] * DIMENSIONS, "long_factor": [3.0] * DIMENSIONS}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": LIMIT, "factor": 4.0},
    **FACTORS,
}
PHI = {**LONG, "short_mscale": 1.0, "long_mscale": 1.4}


def family(name, **changes):
    torch.manual_seed(3)
    config = tiny_config(name, max_position_embeddings=48, **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()


def phimoe():
    """As Phi-3.5-MoE: Transformers computes the cache anew where a text grows past the original length."""
    model = family("phimoe", rope_parameters=PHI)
    model.config.original_max_position_embeddings = LIMIT
    return model


def generated(model, ids, count):
    new = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **new)[0, ids.shape[1] :].tolist()


# Layers with values of their own


def test_a_cache_has_the_sum_of_its_layers():
    """Gemma 4 gives its full-attention layers heads of their own, and refuses to be asked for one value."""
    config = tiny_config("gemma4_text")
    sizes = [(x.num_key_value_heads or x.num_attention_heads) * x.head_dim for x in layer_configs(config)]
    assert len(sizes) == config.num_hidden_layers
    assert len(set(sizes)) > 1
    assert estimated_cache(config, torch.bfloat16).sequence_bytes(10) == sum(sizes) * 10 * 2 * 2
    assert batch_size(config, 10) >= 1


def test_layers_without_values_of_their_own_are_all_alike():
    config = tiny_config("olmoe")
    assert layer_configs(config) == [config] * config.num_hidden_layers
    token_bytes = 3 * config.num_key_value_heads * 16 * 2 * 2
    assert estimated_cache(config, torch.bfloat16).sequence_bytes(10) == 10 * token_bytes
    assert len(layer_configs(types.SimpleNamespace())) == 1


def test_what_varies_by_layer_is_read_by_layer():
    config = OlmoeConfig(num_hidden_layers=3, num_experts_per_tok=2, sliding_window=None)
    config.per_layer_config = {1: {"num_experts_per_tok": 6, "num_key_value_heads": 4}}
    assert experts_per_token(config) == 6
    assert estimated_cache(config, torch.uint8).sequence_bytes(1) == 2 * (16 * 128 + 4 * 128 + 16 * 128)


def test_a_window_of_a_layers_own_is_nothing_for_one_mask():
    model = family("mixtral", sliding_window=8)
    assert Decoder(model, 1, 20)._windows == {"all": 8}
    model.config.per_layer_config = {1: {"sliding_window": 4}}
    with pytest.raises(Unsupported, match="windows of several lengths"):
        Decoder(model, 1, 20)


# Rotary factors


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, None),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, None),
        ({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 9}, None),
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 48),
        (LONG, LIMIT),
    ],
)
def test_where_factors_change(parameters, limit):
    config = OlmoeConfig(max_position_embeddings=48, rope_parameters=parameters)
    assert rotary_limit(config) == limit


def test_factors_by_type_of_layer_and_by_the_older_name():
    by_type = {"full_attention": LONG, "sliding_attention": {"rope_type": "default", "rope_theta": 1.0}}
    assert rotary_limit(types.SimpleNamespace(rope_parameters=by_type, max_position_embeddings=48)) == LIMIT
    old = types.SimpleNamespace(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=48)
    assert rotary_limit(old) == 48
    assert rotary_limit(types.SimpleNamespace(rope_scaling=None)) is None
    assert rotary_limit(Gemma4TextConfig()) is None
    assert PhimoeConfig().model_type == "phimoe"


@pytest.mark.parametrize("make", [phimoe, lambda: family("olmoe", rope_parameters=LONG)], ids=["phimoe", "olmoe"])
def test_a_sequence_within_one_set_of_factors_is_decoded_as_ever(make):
    model = make()
    ids = tokens(1, 5)
    decoder = Decoder(model, 1, LIMIT)
    steps = [decoder.prefill(ids).tolist(), *decoder.decode(LIMIT - 6)]
    assert [token for (token,) in steps] == generated(model, ids, LIMIT - 5)


@pytest.mark.parametrize("make", [phimoe, lambda: family("olmoe", rope_parameters=LONG)], ids=["phimoe", "olmoe"])
def test_a_sequence_that_may_pass_the_change_is_left_to_transformers(make):
    with pytest.raises(Unsupported, match="its rotary factors change at 12 tokens"):
        Decoder(make(), 1, LIMIT + 1)


@pytest.mark.parametrize("prompt", [1, 5, 15])
@torch.no_grad()
def test_texts_are_written_as_by_a_model_without_cache(prompt):
    """Past the change, all keys are turned by the other factors. A prompt may be longer than that."""
    model = phimoe()
    ids = tokens(2, 20)
    step = Stepper(model, 20, static=False).begin(2)
    for n in range(prompt, 20):
        logits = step(ids[:, :n] if n == prompt else ids[:, n - 1 : n])
        exact = model(input_ids=ids[:, :n], use_cache=False).logits[:, -1]
        assert torch.allclose(logits, exact, atol=1e-4), n
    static_step = Stepper(model, 20, static=True)
    static_step.begin(2)
    assert "rotary factors change" in static_step.eager_reason


def test_embedding_rows_are_those_of_the_model():
    model = family("olmoe")
    assert embedding_rows(model) == model.config.vocab_size
    model.resize_token_embeddings(400)
    assert embedding_rows(model) == 400
    unknown = types.SimpleNamespace(
        get_input_embeddings=lambda: object(), config=types.SimpleNamespace(get_text_config=lambda: model.config)
    )
    assert embedding_rows(unknown) == 400
