"""Damage to packed checkpoints that headers alone do not show, and what config.json may claim.

Every way of reading refuses the same damage with the same line.
"""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

import gemq
from gemq import UserError
from gemq.checkpoint.contents import inspect_checkpoint
from gemq.checkpoint.dense_export import write_dense_checkpoint
from gemq.checkpoint.reader import check_checkpoint
from support import plain_reader
from support.packed_checkpoints import write_packed

IDS = torch.arange(3, 23).reshape(1, 20)
CODES = "model.layers.1.mlp.experts.2.down_proj.codes"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed") / "olmoe")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed") / "sharded", shard_bytes=20_000)


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "copy")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def edit_config(directory, change):
    values = json.loads((directory / "config.json").read_text())
    change(values)
    (directory / "config.json").write_text(json.dumps(values))


def edit_header(directory, change, name="model.safetensors"):
    raw = (directory / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def readers(tmp_path):
    """Every way of reading the data of a packed checkpoint."""
    return {
        "load": gemq.load,
        "from_pretrained": AutoModelForCausalLM.from_pretrained,
        "export --dense": lambda directory: write_dense_checkpoint(directory, tmp_path / "twin"),
        "vLLM": check_checkpoint,
        "inspect --verify": lambda directory: inspect_checkpoint(directory, verify=True),
    }


def refused(directory, tmp_path, text):
    """The line with which all readers refuse, which contains ``text``."""
    lines = set()
    for read in readers(tmp_path).values():
        with pytest.raises(UserError, match=text) as caught:
            read(directory)
        lines.add(str(caught.value))
        assert not (tmp_path / "twin").exists()
    assert len(lines) == 1
    return lines.pop()


def test_an_undamaged_checkpoint_is_verified(packed, tmp_path):
    for read in readers(tmp_path).values():
        read(packed)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("position", [-1, -5000, 0])
def test_a_flipped_bit_is_noticed(copy, tmp_path, position, bit):
    file = copy / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[position if position < 0 else start + position] ^= 1 << bit
    file.write_bytes(raw)
    assert "copy model.safetensors again" in refused(copy, tmp_path, "not what gemq wrote")


def test_swapped_entries_of_the_header_are_noticed(copy, tmp_path):
    def swap(header):
        entry_0, entry_2 = (header[f"model.layers.1.mlp.experts.{expert}.down_proj.scales"] for expert in (0, 2))
        assert entry_0["shape"] == entry_2["shape"]
        entry_0["data_offsets"], entry_2["data_offsets"] = entry_2["data_offsets"], entry_0["data_offsets"]

    edit_header(copy, swap)
    assert "first: model.layers.1:" in refused(copy, tmp_path, "not what gemq wrote")


def test_a_type_that_lies_is_noticed(copy, tmp_path):
    edit_header(copy, lambda header: header["model.norm.weight"].update(dtype="F16"))
    assert "first: other:" in refused(copy, tmp_path, "not what gemq wrote")


def test_the_damaged_file_is_named(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][CODES]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert file.name in refused(directory, tmp_path, "not what gemq wrote")


def test_weights_that_were_changed_and_saved_again_are_noticed(copy, tmp_path):
    tensors = load_file(copy / "model.safetensors")
    tensors[CODES] = 255 - tensors[CODES]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, tmp_path, "not what gemq wrote")


def test_a_changed_config_is_noticed_until_its_checksum_is_deleted(copy, tmp_path):
    edit_config(copy, lambda values: values.update(rms_norm_eps=0.1))
    line = refused(copy, tmp_path, "config.json of .* is not what gemq wrote")
    assert 'delete "config" from "gemq_checksums"' in line
    edit_config(copy, lambda values: values["gemq_checksums"].pop("config"))
    assert gemq.load(copy).config.rms_norm_eps == 0.1
    inspect_checkpoint(copy, verify=True)


def test_a_config_that_is_only_laid_out_differently_is_fine(copy):
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(sorted(values.items(), reverse=True)), indent=7))
    inspect_checkpoint(copy, verify=True)


def test_another_division_into_files_is_fine(packed, sharded, tmp_path):
    """Checksums belong to tensors, whichever file holds them."""
    directory = shutil.copytree(packed, tmp_path / "copy")
    (directory / "model.safetensors").unlink()
    for file in sharded.glob("model*"):
        shutil.copy(file, directory / file.name)
    inspect_checkpoint(directory, verify=True)
    assert torch.equal(logits(gemq.load(directory)), logits(gemq.load(packed)))


def test_saving_a_loaded_model_drops_the_checksums(packed, tmp_path, caplog):
    """They would not be true of what was trained, cast or renamed."""
    model = gemq.load(packed, dtype=torch.float32)
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "saved")
    assert "save_pretrained writes no checksums" in caplog.text
    assert "gemq_checksums" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(gemq.load(tmp_path / "saved")), logits(model))
    inspect_checkpoint(tmp_path / "saved")
    with pytest.raises(UserError, match="has no checksums to verify it with"):
        inspect_checkpoint(tmp_path / "saved", verify=True)


@pytest.mark.parametrize(
    "checksums",
    [None, 7, [], {}, {"algorithm": "sha256"}]
    + [{"algorithm": "xxh3_64", **c} for c in ({"tensors": []}, {"config": "x"}, {"tensors": {"other": 7}})],
)
def test_damaged_checksums_are_refused(copy, tmp_path, checksums):
    edit_config(copy, lambda values: values.update(gemq_checksums=checksums))
    refused(copy, tmp_path, "gemq_checksums in config.json is damaged|checksums are of the kind")


def mixtral(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return write_packed(tmp_path / "mixtral", MixtralConfig(**sizes, **heads, initializer_range=0.2))


def test_what_save_pretrained_renamed_is_read_by_all(tmp_path):
    """Mixtral's packed tensors get the names of its experts on the hub."""
    packed = mixtral(tmp_path)
    model = gemq.load(packed)
    model.save_pretrained(tmp_path / "saved")
    assert any("block_sparse_moe.experts.0" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    facts, saved_facts = inspect_checkpoint(packed).to_dict(), inspect_checkpoint(tmp_path / "saved").to_dict()
    assert {**facts, "model": ""} == {**saved_facts, "model": ""}
    assert torch.equal(logits(gemq.load(tmp_path / "saved")), logits(model))
    check_checkpoint(tmp_path / "saved")
    for name in ("mixtral", "saved"):
        write_dense_checkpoint(tmp_path / name, tmp_path / f"{name}-twin")
    weights, saved_weights = (
        load_file(tmp_path / f"{name}-twin" / "model.safetensors") for name in ("mixtral", "saved")
    )
    assert weights.keys() == saved_weights.keys()
    assert all(torch.equal(weights[name], saved_weights[name]) for name in weights)


def test_a_stale_file_is_not_read_by_anything(packed, copy, tmp_path):
    tensors = {
        name: 255 - t if name.endswith(".codes") else t for name, t in load_file(copy / "model.safetensors").items()
    }
    for name in ("model-00001-of-00002.safetensors", "zzz.safetensors"):
        save_file(tensors, copy / name, metadata={"format": "pt"})
    assert torch.equal(logits(gemq.load(copy)), logits(gemq.load(packed)))
    assert inspect_checkpoint(copy).stored_bytes == inspect_checkpoint(packed).stored_bytes
    write_dense_checkpoint(copy, tmp_path / "one")
    write_dense_checkpoint(packed, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_the_same_tensor_in_two_files_is_refused(sharded, tmp_path):
    directory = shutil.copytree(sharded, tmp_path / "copy")
    names = sorted(file.name for file in directory.glob("*.safetensors"))
    shutil.copy(directory / names[0], directory / names[1])
    refused(directory, tmp_path, f"and {names[1]} both hold")


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_pickled_files_are_never_read(copy, tmp_path, monkeypatch, has_safetensors):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    edit_config(copy, lambda values: (values.pop("dtype"), values.pop("gemq_checksums")))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickled file is read"))
    if has_safetensors:
        gemq.load(copy)
        check_checkpoint(copy)
        return
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    for read in (gemq.load, check_checkpoint, inspect_checkpoint):
        with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
            read(copy)


def test_an_adapter_beside_the_model_is_refused(copy, tmp_path):
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    refused(copy, tmp_path, "holds an adapter next to the packed model")


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.gate.weight", "model.norm.weight"])
def test_no_twin_is_written_without_a_router_or_a_norm(copy, tmp_path, missing):
    tensors = load_file(copy / "model.safetensors")
    del tensors[missing]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for read in (gemq.load, lambda directory: write_dense_checkpoint(directory, tmp_path / "twin"), check_checkpoint):
        with pytest.raises(UserError, match=f"1 unpacked tensors do not fit the model, first: {missing} is missing"):
            read(copy)
    assert not (tmp_path / "twin").exists()


LARGE = {
    "num_hidden_layers": (10**6, 10**9),
    "num_labels": (10**9,),
    "num_experts": (10**6, 10**9),
    "vocab_size": (5000, 10**13),
    "hidden_size": (6400, 10**9),
    "num_attention_heads": (8, 10**9),
    "intermediate_size": (10**9,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LARGE.items() for value in values])
def test_a_number_larger_than_the_files_is_refused_quickly(copy, tmp_path, key, value):
    edit_config(copy, lambda values: (values.update({key: value}), values.pop("gemq_checksums")))
    begin = time.process_time()
    for read in (gemq.load, lambda directory: write_dense_checkpoint(directory, tmp_path / "twin"), check_checkpoint):
        with pytest.raises(UserError):
            read(copy)
    assert time.process_time() - begin < 5
    assert not (tmp_path / "twin").exists()


ODD = {
    "experts is a list": {"experts": []},
    "experts without lists": {"experts": {"model.layers.0.mlp.experts": {"down_proj": 2, "gate_up_proj": 2}}},
    "linears is text": {"linears": "x"},
    "no linears": {"linears": None},
    "group size of text": {"group_size": "128"},
    "group size true": {"group_size": True},
    "huge group size": {"group_size": 1 << 200},
    "negative group size": {"group_size": -128},
    "fingerprint": {"fingerprint": ["x"]},
    "version as text": {"format_version": "2"},
    "no version": {"format_version": None},
    "width of text": {"linears": {"model.layers.0.self_attn.q_proj": "4"}},
    "width true": {"linears": {"model.layers.0.self_attn.q_proj": True}},
    "width NaN": {"linears": {"model.layers.0.self_attn.q_proj": float("nan")}},
    "width negative": {"linears": {"model.layers.0.self_attn.q_proj": -4}},
    "width of 400 digits": {"linears": {"model.layers.0.self_attn.q_proj": 10**400}},
    "nested widths": {"linears": {"model.layers.0.self_attn.q_proj": [[4]]}},
    "superscript": {"linears": {"model.layers.\u00b2.x": 4}},
    "escape": {"linears": {"\x1b]0;title\x07": 4}},
    "empty path": {"linears": {"": 4}},
    "dots": {"linears": {"model..x": 4}},
    "a path that is no linear": {"linears": {"model.layers.0": 4}},
    "an attribute that is no module": {"linears": {"model.layers.0.self_attn.config": 4}},
    "experts that are none": {"experts": {"model.layers.0": {"down_proj": [2], "up_proj": [2]}}},
    "nothing": {"experts": {}, "linears": {}},
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_odd_settings_are_one_line_each(copy, tmp_path, change):
    def odd(values):
        del values["gemq_checksums"]
        values["quantization_config"].update(change)

    edit_config(copy, odd)
    for read in (gemq.load, check_checkpoint, inspect_checkpoint):
        with pytest.raises(UserError) as caught:
            read(copy)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"model_type": "nope"},
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_attention_heads": 0},
        {"num_experts_per_tok": None},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": 0},
        {"dtype": "x"},
        {"architectures": 7},
        {"pad_token_id": 10**6},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_cannot_use_is_one_line(copy, tmp_path, change):
    edit_config(copy, lambda values: (values.update(change), values.pop("gemq_checksums")))
    for read in (gemq.load, lambda directory: write_dense_checkpoint(directory, tmp_path / "twin"), check_checkpoint):
        with pytest.raises(UserError) as caught:
            read(copy)
        assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(copy, tmp_path):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("{", '{"vocab_size": 96,', 1))
    with pytest.raises(UserError, match="has the key 'vocab_size' twice"):
        gemq.load(copy)


def test_many_entries_of_a_header_are_refused_quickly(copy, tmp_path):
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{number:x}":{entry}' for number in range(700_000)) + "}").encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    begin = time.process_time()
    line = refused(copy, tmp_path, "gemq reads at most")
    assert "model.safetensors" in line
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("kind", ["packed", "sharded"])
def test_the_checksums_are_those_that_the_format_describes(kind, request):
    """Computed by a reader that shares no code with gemq."""
    directory = request.getfixturevalue(kind)
    assert json.loads((directory / "config.json").read_text())["gemq_checksums"] == plain_reader.checksums(directory)
