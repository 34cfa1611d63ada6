"""Configurations, tokenizers and code beside a model that cannot be used: one line that names the field."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch

import gemq
from gemq import UserError
from gemq.models.config_checks import suspicious_fields
from gemq.models.library_errors import one_line_errors, summary
from gemq.models.source import Source
from gemq.pipeline.plan import plan
from gemq.recipe import Recipe
from support.model_folders import edit_config, edit_tensors, model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")

REFUSED = {
    "an int where a float is meant": ({"router_aux_loss_coef": 0}, "router_aux_loss_coef"),
    "null where a bool is meant": ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    "a float count": ({"num_experts": 6.0}, "num_experts"),
    "a text for a number": ({"hidden_size": "64"}, "hidden_size"),
    "a list for a number": ({"num_hidden_layers": [3]}, "num_hidden_layers"),
    "a type that torch does not have": ({"dtype": "fp16"}, "dtype is 'fp16'"),
    "an old type that torch does not have": ({"torch_dtype": "half precision"}, "torch_dtype is 'half precision'"),
    "a pad token behind the vocabulary": ({"pad_token_id": 320}, r"pad_token_id \(320, and vocab_size is 320\)"),
    "a number as text in rope_parameters": (
        {"rope_parameters": {"rope_theta": "10000", "rope_type": "default"}},
        r"rope_parameters\.rope_theta \('10000'\)",
    ),
    "a kind of rope that there is not": ({"rope_parameters": {"rope_type": "cosmic", "rope_theta": 1e4}}, "cosmic"),
    "an activation that there is not": ({"hidden_act": "swoosh"}, "swoosh"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "a negative size": ({"hidden_size": -64}, "hidden_size"),
    "more experts a token than there are": ({"num_experts_per_tok": 7}, "7 of 6 .* correct num_experts_per_tok"),
    "no expert a token": ({"num_experts_per_tok": 0}, "0 of 6 .* correct num_experts_per_tok"),
    "no experts": ({"num_experts": 0}, r"its down_proj is \[0, "),
    "a type of model that there is not": ({"model_type": "tomorrow"}, "is of type 'tomorrow'"),
    "a number for the type of model": ({"model_type": 7}, "model_type is 7"),
    "no type of model": ({"model_type": None}, "is of type 'None'"),
    "a dense model": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "has no experts"),
    "quantized by others": ({"quantization_config": {"quant_method": "awq"}}, r"quantized already \(awq\)"),
    "quantized somehow": ({"quantization_config": {}}, r"quantized already \(unknown\)"),
    "quantized as a list": ({"quantization_config": [1]}, r"quantization_config is \[1\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_names_the_field(case, tmp_path):
    values, message = REFUSED[case]
    source = model_folder(tmp_path / "model")
    edit_config(source, **values)
    for command in (lambda: plan(source, Recipe(seq_len=16), device="cpu"), lambda: quantize(source)):
        with pytest.raises(UserError, match=message) as caught:
            command()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"model_type": ' + "[" * 5000, "\xff"])
def test_what_is_no_configuration_is_refused(text, tmp_path):
    source = model_folder(tmp_path / "model")
    (source / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        quantize(source)


def test_sizes_that_do_not_fit_the_files_are_named(tmp_path):
    source = model_folder(tmp_path / "model")
    edit_config(source, num_experts=5)
    with pytest.raises(UserError, match=r"experts\.\S+ as \[6, .* by config\.json it is \[5, "):
        quantize(source)
    edit_config(source, num_experts=6, num_hidden_layers=4)
    with pytest.raises(UserError, match=r"lacks \d+ of the model's tensors, first: model\.layers\.3\."):
        quantize(source)
    edit_config(source, num_hidden_layers=2)
    with pytest.raises(UserError, match=r"config\.json says that it has 2 layers"):
        quantize(source)
    assert not (tmp_path / "out.work").exists()


def test_a_gated_model_is_named_as_such(monkeypatch):
    """A name that is right is not called wrong."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError.__new__(GatedRepoError)  # its arguments differ between releases

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"org/model is gated: accept its terms .* HF_TOKEN"):
        plan("org/model", Recipe(), device="cpu")


def test_outputs_are_read_by_name_whatever_config_json_says(tmp_path):
    source = model_folder(tmp_path / "model")
    edit_config(source, return_dict=False)
    quantize(source)
    gemq.load(tmp_path / "out")
    assert "return_dict" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_model_that_cannot_run_is_refused_before_anything_is_computed(tmp_path):
    source = model_folder(tmp_path / "model", "deepseek_v3")
    edit_config(source, n_group=3)  # of four experts
    with pytest.raises(UserError, match="cannot be run") as caught:
        quantize(source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.work").exists()


# Tokenizers


def edit_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_tokenizers_that_cannot_be_read_are_refused(tmp_path):
    source = model_folder(tmp_path / "model")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    edit_json(source / "tokenizer.json", model={**model, "type": "ModelOfTomorrow"})
    with pytest.raises(UserError, match="cannot read the tokenizer of"):
        quantize(source)
    edit_json(source / "tokenizer.json", model=model)
    edit_json(source / "tokenizer_config.json", model_max_length="many")
    with pytest.raises(UserError, match="cannot read the tokenizer of"):
        quantize(source)
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer of"):
        quantize(source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        quantize(source)
    assert not (tmp_path / "out.work").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """It has tokens that the embedding has no rows for. Tokens that were added to it may lie there."""
    source = model_folder(tmp_path / "model", vocab_size=256, pad_token_id=0)
    with pytest.raises(UserError, match=r"has 259 tokens and the model has embeddings for 256 \(vocab_size\)"):
        quantize(source)
    bigger = model_folder(tmp_path / "other", vocab_size=259)
    added = {"id": 259, "content": "<more>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = json.loads((bigger / "tokenizer.json").read_text())["added_tokens"]
    edit_json(bigger / "tokenizer.json", added_tokens=[*tokens, {**added, **flags}])
    assert len(Source(bigger).tokenizer) == 260


def test_code_that_lacks_a_package_is_refused(tmp_path):
    code = "import package_that_is_not_there\nfrom transformers import {base}\nclass Mine({base}):\n    pass\n"
    source = model_folder(tmp_path / "model")
    (source / "tokenization_mine.py").write_text(code.format(base="PreTrainedTokenizerFast"))
    edit_json(
        source / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]},
    )
    with pytest.raises(UserError, match=r"tokenizer .*package_that_is_not_there.*: install what is missing"):
        _ = Source(source, trust_remote_code=True).tokenizer
    (source / "configuration_mine.py").write_text(code.format(base="OlmoeConfig"))
    edit_config(source, model_type="mine", auto_map={"AutoConfig": "configuration_mine.Mine"})
    with pytest.raises(UserError, match=r"configuration .*package_that_is_not_there.*: install what is missing"):
        Source(source, trust_remote_code=True).config()


def test_a_generation_config_that_cannot_be_read_is_refused(tmp_path):
    source = model_folder(tmp_path / "model")
    (source / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read the generation_config\.json of"):
        Source(source).load(CPU, None)


# Adapters


def test_an_adapter_beside_a_whole_model_is_said_and_left_alone(tmp_path):
    """With peft installed, Transformers would put it on the model, or load the model that the adapter names."""
    source, base = model_folder(tmp_path / "model"), model_folder(tmp_path / "other")
    shutil.copy(source / "model.safetensors", source / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (source / "adapter_config.json").write_text(json.dumps(described))
    edit_tensors(base, lambda t: {name: tensor * 0 for name, tensor in t.items()})
    with pytest.warns(UserWarning, match=r"the adapter in \S+ \(adapter_config\.json\) is not applied"):
        quantize(source)
    assert not [file.name for file in (tmp_path / "out").iterdir() if "adapter" in file.name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemq.load(tmp_path / "out")


# The mechanism


def test_exceptions_in_one_line():
    assert summary(ValueError("the first\nsecond")) == "the first"
    assert summary(ValueError("for field 'x':\n    expected int")) == "for field 'x': expected int"
    assert summary(KeyError("x")) == "KeyError: 'x'"
    assert summary(AssertionError()) == "AssertionError"
    assert len(summary(ValueError("a b" * 1000))) == 300
    with pytest.raises(UserError, match=r"^it fails \(too bad\): try again$"), one_line_errors("it fails", "try again"):
        raise TypeError("too bad")
    with pytest.raises(UserError, match=r"^as it was$"), one_line_errors("it fails", "try again"):
        raise UserError("as it was")
    with pytest.raises(MemoryError), one_line_errors("it fails", "try again"):
        raise MemoryError


def test_fields_with_unusual_values():
    defaults = {"heads": 4, "part": {"size": 8, "bias": False}, "dropout": 0.0, "vocab_size": 100}
    assert suspicious_fields({"heads": 4, "part": {"size": 8}, "dropout": 0.0}, defaults) == []
    assert suspicious_fields({"heads": 0}, defaults) == ["heads (0)"]
    assert suspicious_fields({"part": {"size": "8"}}, defaults) == ["part.size ('8')"]
    assert suspicious_fields({"heads": True, "dropout": 0}, defaults) == ["heads (True)"]
    assert suspicious_fields({"pad_token_id": 100}, defaults) == ["pad_token_id (100, and vocab_size is 100)"]
