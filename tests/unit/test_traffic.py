"""Bytes of weights that a step reads, and packed models of a given shape with random weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import gemq
from gemq.checkpoint.contents import inspect_checkpoint
from gemq.decoding.decoder import Decoder
from gemq.evaluation.weight_traffic import bytes_per_step, dense_bytes, expert_bytes
from support.families import tiny, tokens

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import shapes

SHAPE = shapes.Shape(
    "tiny",
    shapes.OlmoeConfig,
    {**shapes.SMALL, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256},
)


def test_a_step_reads_dense_weights_and_chosen_experts():
    model = tiny("olmoe")  # 6 experts, 2 a token
    layers, experts = len(model.model.layers), model.model.layers[0].mlp.experts
    bytes_per_expert = experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes
    assert expert_bytes(experts) == [bytes_per_expert] * 6
    everything = sum(p.nbytes for p in model.parameters())
    embedding = model.model.embed_tokens.weight.nbytes
    assert dense_bytes(model) == everything - layers * 6 * bytes_per_expert - embedding
    decoder = Decoder(model, 1, 40)
    decoder.prefill(tokens(1, 9))
    assert bytes_per_step(decoder, steps=3) == dense_bytes(model) + layers * 2 * bytes_per_expert


def test_a_tied_embedding_is_read_as_the_head():
    model = tiny("qwen2_moe")
    experts = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    routed = sum(sum(expert_bytes(module)) for module in experts)
    assert dense_bytes(model) == sum(p.nbytes for p in model.parameters()) - routed


def test_random_models_in_memory_and_on_disk_are_the_same(tmp_path):
    model = shapes.packed_model(SHAPE, "cpu", seed=3)
    shapes.write(SHAPE, tmp_path / "out", seed=3)
    loaded = gemq.load(tmp_path / "out")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        assert expected.isfinite().all()
        assert expected.std() > 0.01
        assert loaded(ids).logits.equal(expected)
    contents = inspect_checkpoint(tmp_path / "out")
    assert contents.expert_bits_nominal == pytest.approx(shapes.mean_bits(SHAPE), abs=0.1)
    read = dense_bytes(loaded) + sum(sum(expert_bytes(layer.mlp.experts)) for layer in loaded.model.layers)
    assert read == contents.stored_bytes - loaded.model.embed_tokens.weight.nbytes


def test_true_shapes_have_the_true_sizes():
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    for name, billions in (("olmoe-1b-7b-2.0", 6.92), ("mixtral-8x7b-2.5", 46.7)):
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(shapes.SHAPES[name].dense_config())
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.005)
