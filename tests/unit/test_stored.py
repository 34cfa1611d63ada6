"""Checks that a model takes every tensor that its files store, or that loading refuses the files."""

from __future__ import annotations

import json

import pytest
import torch

from gemq import UserError
from gemq.models.source import Source
from support.model_folders import edit_tensors, model_folder, quantize

pytestmark = pytest.mark.sample
torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYER = "model.layers.1"
EXPERT = f"{LAYER}.mlp.experts.3"


def to_codes(kind: torch.dtype, scale: str = "{}_scale", only: str = "proj.weight"):
    """Changes weights to codes of a type with one scale each. config.json does not mention them."""

    def change(tensors):
        changed = {}
        for name, tensor in tensors.items():
            changed[name] = tensor
            if name.endswith(only):
                largest = 448 if kind.is_floating_point else 127
                factor = tensor.float().abs().max() / largest
                changed[name] = (tensor.float() / factor).to(kind)
                if scale:
                    changed[scale.format(name)] = factor.reshape(())
        return changed

    return change


def without(*names):
    """Removes tensors."""
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def with_tensors(**shapes):
    """Adds tensors of ones. Two underscores in a name stand for a dot."""
    return lambda tensors: {**tensors, **{n.replace("__", "."): torch.ones(shape) for n, shape in shapes.items()}}


def fused(tensors):
    """Adds fused experts of layer 1, which also has separate ones."""
    experts = f"{LAYER}.mlp.experts"
    gate, up, down = (
        torch.stack([tensors[f"{experts}.{e}.{p}_proj.weight"] for e in range(6)]) for p in ("gate", "up", "down")
    )
    return {**tensors, f"{experts}.gate_up_proj": torch.cat([gate, up], 1), f"{experts}.down_proj": down}


REFUSED = {
    "fp8 codes": (to_codes(torch.float8_e4m3fn), r"stores model\.layers\.\S+ as float8_e4m3fn, and config.json has no"),
    "int8 codes": (to_codes(torch.int8), r"as int8, and config.json has no quantization_config"),
    "fp8 codes without scales": (to_codes(torch.float8_e4m3fn, ""), r"as float8_e4m3fn, and config.json has no"),
    "codes of one expert": (
        to_codes(torch.int8, only="experts.3.up_proj.weight"),
        r"experts\.3\.up_proj\.weight as int8",
    ),
    "scales beside weights": (
        with_tensors(**{f"{EXPERT}.up_proj.weight_scale".replace(".", "__"): (1,)}),
        r"first model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale; these are parts of a quantized model",
    ),
    "packed codes": (
        with_tensors(model__layers__0__self_attn__q_proj__qweight=(8, 8)),
        r"q_proj\.qweight; these are parts of a quantized model",
    ),
    "biases": (
        with_tensors(model__layers__0__self_attn__q_proj__bias=(64,), model__layers__1__self_attn__q_proj__bias=(64,)),
        r"stores 2 tensors that the model has no place for, first model\.layers\.0\.self_attn\.q_proj\.bias; "
        r"config.json may lack an option \(such as attention_bias\)",
    ),
    "a router's correction": (
        with_tensors(model__layers__1__mlp__gate__e_score_correction_bias=(4,)),
        r"gate\.e_score_correction_bias; config.json may lack",
    ),
    "further layers": (
        with_tensors(model__layers__3__self_attn__q_proj__weight=(64, 64)),
        r"q_proj\.weight; config.json says that it has 3 layers",
    ),
    "a matrix of the head": (with_tensors(value_head__weight=(1, 64)), r"first value_head\.weight"),
    "experts fused and one by one": (
        fused,
        r"stores model\.layers\.1\.mlp\.experts\.\S+ twice, as \S+ and as \S+: delete",
    ),
    "two names": (
        lambda t: {**t, "norm.weight": t["model.norm.weight"].clone()},
        r"stores model\.norm\.weight twice, as \S+ and as \S+",
    ),
    "one matrix of an expert missing": (
        without(f"{EXPERT}.up_proj.weight"),
        r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "an expert missing": (
        without(*(f"{EXPERT}.{p}_proj.weight" for p in ("gate", "up", "down"))),
        r"stores model\.layers\.1\.mlp\.experts\.\S+ as \[5, \d+, \d+\], and by config.json it is \[6, \d+, \d+\]",
    ),
    "a norm missing": (without("model.norm.weight"), r"lacks 1 of the model's tensors, first: model\.norm\.weight"),
    "another shape": (
        lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:-1]},
        r"stores lm_head\.weight as \[319, 64\], and by config.json it is \[320, 64\]",
    ),
    "an expert of another shape": (
        lambda t: {**t, f"{EXPERT}.up_proj.weight": t[f"{EXPERT}.up_proj.weight"][:-1]},
        r"cannot make model\.layers\.1\.mlp\.experts\.gate_up_proj \S+ \S+ from 12 stored tensors \(.+\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_the_model_would_misread_are_refused(case, tmp_path):
    change, message = REFUSED[case]
    source = model_folder(tmp_path / "model")
    edit_tensors(source, change)
    for read in (lambda: Source(source).open(CPU, torch.float32), lambda: Source(source).load(CPU, None)):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        quantize(source)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_a_description_in_another_file_does_not_help(tmp_path):
    """Some exporters describe their codes in hf_quant_config.json alone."""
    source = model_folder(tmp_path / "model")
    edit_tensors(source, to_codes(torch.float8_e4m3fn))
    description = {"producer": {"name": "any"}, "quantization": {"quant_algo": "FP8"}}
    (source / "hf_quant_config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"config\.json has no quantization_config"):
        quantize(source)


HARMLESS = {
    "rotary frequencies": {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)},
    "counts of batches": {"model.layers.0.norm.num_batches_tracked": ()},
    "attention masks": {"model.layers.0.attn.bias": (1, 1, 16, 16), "model.layers.0.attn.masked_bias": ()},
    "scales of a cache": {"model.layers.0.self_attn.k_scale": (), "model.layers.0.self_attn.v_proj.output_scale": (1,)},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_tensors_are_ignored(case, tmp_path):
    source = model_folder(tmp_path / "model")
    expected, _ = Source(source).load(CPU, None)
    edit_tensors(source, lambda t: {**t, **{name: torch.ones(shape) for name, shape in HARMLESS[case].items()}})
    loaded, _ = Source(source).load(CPU, None)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())
    _, reader = Source(source).open(CPU, torch.float32)
    assert reader.left_out == []


def test_modules_that_predict_several_tokens_are_ignored_and_reported(tmp_path):
    source = model_folder(tmp_path / "model")
    names = [
        "mtp.fc.weight",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.gate.weight",
        "model.nextn.0.proj.weight",
    ]
    edit_tensors(
        source, lambda t: {**t, **{name: torch.ones(8, 8) for name in names}, "mtp.norm.weight": torch.ones(8)}
    )
    _, reader = Source(source).open(CPU, torch.float32)
    assert reader.left_out == sorted(names)


@pytest.mark.parametrize("kind", ["F4", "F8_E4M3FNUZ"])
def test_types_that_torch_does_not_have_are_refused(kind, tmp_path):
    source = model_folder(tmp_path / "model")
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = f"{EXPERT}.up_proj.weight"
    elements = 8 if kind == "F4" else 4  # of four bytes
    header[name] |= {"dtype": kind, "shape": [header[name]["shape"][0] * elements, header[name]["shape"][1]]}
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
    with pytest.raises(UserError, match=rf"stores {name} as {kind}: give the model in 16 or 32 bits"):
        Source(source).load(CPU, None)


def test_integers_where_the_model_has_them_are_read(tmp_path):
    """Such as a table that routes tokens, which is no quantized weight."""
    source = model_folder(tmp_path / "model", "deepseek_v4")
    _, reader = Source(source).open(CPU, torch.float32)
    assert torch.int64 in reader.types.values()
