"""Checkpoints whose experts have trellis codes (version 3 of the format): written by plain code, read in every way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

import gemq
from gemq import UserError
from gemq.checkpoint.contents import inspect_checkpoint
from gemq.checkpoint.dense_export import write_dense_checkpoint
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.reader import CheckpointReader, check_checkpoint
from gemq.cli.tables import print_contents
from gemq.integrations.vllm.served_experts import empty_matrices, packed_family_experts, rank_rows
from gemq.quant.grid import decode_scales
from gemq.quant.stored_matrix import concatenate
from gemq.quant.widths import ALL_TRELLIS_WIDTHS, TrellisWidth, Width
from support import plain_reader
from support.packed_cases import random_routing
from support.packed_checkpoints import TRELLIS_WIDTHS, olmoe_config, write_packed, write_trellis

pytestmark = pytest.mark.sample  # loading differs most between versions of Transformers

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
TOKENS = torch.arange(3, 23).reshape(1, 20)
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_trellis(tmp_path_factory.mktemp("trellis") / "olmoe")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def test_all_readers_agree_on_the_weights(tmp_path, checkpoint):
    """Those of ``gemq.load``, of a dense export, and of a reader that shares no code with gemq."""
    write_dense_checkpoint(checkpoint, tmp_path / "dense", torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="eager")
    weights, _, _ = plain_reader.read_packed(checkpoint)
    parameters = dict(twin.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(parameters[name].data, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(gemq.load(checkpoint, dtype="float32")), logits(twin), rtol=1e-5, atol=1e-5)


def test_other_numbers_of_state_bits_are_read(tmp_path):
    config = olmoe_config(num_hidden_layers=1)
    for state_bits in (8, 16):
        path = write_trellis(tmp_path / str(state_bits), config, state_bits=state_bits)
        plain, _, _ = plain_reader.read_packed(path)
        weight = gemq.load(path).model.layers[0].mlp.experts.down_proj.dequantize(1, torch.float32)
        torch.testing.assert_close(weight, plain[f"{EXPERTS}.down_proj"][1], rtol=1e-5, atol=1e-5)
        assert inspect_checkpoint(path).state_bits == state_bits


def test_sizes_and_widths_that_inspect_shows(checkpoint):
    contents = inspect_checkpoint(checkpoint, verify=True)
    reader = CheckpointReader(checkpoint)
    experts = [m for m in reader.format.matrices() if isinstance(m.width, TrellisWidth)]
    assert contents.expert_bytes == sum(m.width.matrix_bytes(*reader.shapes[m.kind]) for m in experts)
    assert contents.stored_bytes == sum(spec.bytes for spec in reader.specs.values())
    assert contents.expert_bits_nominal == sum(width.bits for width in TRELLIS_WIDTHS) / 4
    assert contents.layers[0][1] == list(zip(TRELLIS_WIDTHS, TRELLIS_WIDTHS[::-1], strict=True))
    values = json.loads(json.dumps(contents.to_dict()))
    assert (values["codes"], values["state_bits"]) == ("trellis", 12)


def test_many_widths_share_columns_of_the_table(tmp_path):
    path = write_trellis(tmp_path / "many", olmoe_config(num_experts=25), widths=ALL_TRELLIS_WIDTHS)
    console = Console(width=120)
    with console.capture() as captured:
        print_contents(console, inspect_checkpoint(path))
    text = captured.get()
    assert "trellis codes with states of 12 bits" in text
    assert "1-1.375 bit" in text
    assert "2.5-2.875 bit" in text


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_save_pretrained_round_trip(tmp_path, family):
    """Mixtral renames packed tensors, gpt-oss has biases, an interleaved gate and transposed experts."""
    config = (MixtralConfig if family == "mixtral" else GptOssConfig)(**SIZES, intermediate_size=32, head_dim=16)
    path = write_trellis(tmp_path / "packed", config)
    model = gemq.load(path)
    original = logits(model)
    model.save_pretrained(tmp_path / "again")
    again = gemq.load(tmp_path / "again")
    assert torch.equal(logits(again), original)
    state = model.state_dict()
    reader = CheckpointReader(tmp_path / "again")
    for name, spec in reader.expected.items():
        assert tuple(state[name].shape) == spec.shape
        assert state[name].dtype == torch.uint8
    for buffer in again.buffers():
        if buffer.dtype == torch.uint8:
            buffer.zero_()
    again.load_state_dict(state)
    assert torch.equal(logits(again), original)
    assert inspect_checkpoint(tmp_path / "again").expert_bytes == inspect_checkpoint(path).expert_bytes


def test_casts_leave_codes_and_scales_alone(checkpoint):
    model = gemq.load(checkpoint)
    original = {name: t.clone() for name, t in model.state_dict().items() if t.dtype == torch.uint8}
    state = model.to(torch.float32).state_dict()
    assert original
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert logits(model).dtype == torch.float32


def test_ranks_of_vllm_add_up_to_the_layer(tmp_path):
    """Columns are divided between blocks of the rotation, rows between tiles."""
    path = write_trellis(tmp_path / "packed", olmoe_config(num_hidden_layers=1, intermediate_size=256))
    reader = CheckpointReader(path)
    generator = torch.Generator().manual_seed(1)
    index, weights = random_routing(5, 2, 4, generator, torch.float32, "cpu")
    hidden = torch.randn(5, 64, generator=generator)
    experts = gemq.load(path, dtype="float32").model.layers[0].mlp.experts
    ranks = [rank_of_vllm(reader, block * 128, block * 128 + 128) for block in range(2)]
    total = sum(rank(hidden, index, weights) for rank in ranks)
    torch.testing.assert_close(total, experts(hidden, index, weights), rtol=1e-4, atol=1e-4)


def rank_of_vllm(reader: CheckpointReader, start: int, stop: int) -> Any:
    """The neurons ``start`` to ``stop`` of a layer's experts, with 64 inputs and outputs."""
    matrices = {}
    for projection, widths in reader.format.experts[EXPERTS].items():
        is_down = projection == "down_proj"
        side = reader.format.block_side(f"{EXPERTS}.{projection}", 256 if is_down else 64)
        row_ranges = [slice(0, 64)] if is_down else rank_rows(True, True, 256, start, stop)
        blocks = slice(start // side, stop // side) if is_down else slice(0, 1)
        num_rows = sum(rows.stop - rows.start for rows in row_ranges)
        served: Any = empty_matrices(widths, num_rows, blocks.stop - blocks.start, side, reader.format.state_bits)
        for expert in range(len(widths)):
            name = f"{EXPERTS}.{expert}.{projection}"
            slices = [reader.matrix_slice(name, rows, blocks) for rows in row_ranges]
            served.set_matrix(expert, concatenate(slices))
        matrices[projection] = served
    return packed_family_experts(reader.skeleton.get_submodule(EXPERTS), matrices)


def test_affine_linears_are_divided_by_groups(checkpoint):
    packed = CheckpointReader(checkpoint).format
    assert packed.block_side(f"{EXPERTS}.down_proj", 256) == 128
    assert packed.block_side("model.layers.0.self_attn.o_proj", 256) == 64


def test_affine_experts_keep_version_2():
    packed = PackedFormat({"x": {"up_proj": (Width.TWO_BIT,), "down_proj": (Width.TERNARY,)}})
    values = packed.to_dict()
    assert values["format_version"] == 2
    assert not {"codes", "state_bits"} & values.keys()


def test_every_scale_byte_is_a_positive_number():
    """A checkpoint cannot hold NaN or infinite scales."""
    scales = decode_scales(torch.arange(256, dtype=torch.uint8))
    assert scales.isfinite().all()
    assert (scales > 0).all()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_sides_that_are_no_multiples_of_16_are_refused(shape):
    widths = (TrellisWidth(16),)
    packed = PackedFormat({"x": {"up_proj": widths, "down_proj": widths}}, state_bits=12)
    with pytest.raises(UserError, match=rf"x\.0\.up_proj is \[{shape[0]}, {shape[1]}\] .* multiples of 16"):
        packed.expected({"x.up_proj": shape, "x.down_proj": (64, 64)})


def set_width(value: Any) -> Any:
    return lambda tensors, values: values["experts"][EXPERTS]["down_proj"].__setitem__(2, value)


def set_key(key: str, value: Any) -> Any:
    return lambda tensors, values: values.__setitem__(key, value)


def change_tensor(name: str, change: Any) -> Any:
    return lambda tensors, values: tensors.__setitem__(name, change(tensors[name]).contiguous())


CODES, SCALES = f"{EXPERTS}.2.down_proj.codes", f"{EXPERTS}.2.down_proj.scales"
DAMAGE = {
    "no eighth": (set_width(2.3), r"no trellis width 2\.3: choose a multiple of 0\.125 from 1 to 4"),
    "too narrow": (set_width(0.875), r"no trellis width 0\.875"),
    "too wide": (set_width(4.125), r"no trellis width 4\.125"),
    "width NaN": (set_width(float("nan")), "no trellis width nan"),
    "width of text": (set_width("2"), "has the width '2', which is not a number"),
    "other width": (set_width(2.25), r"down_proj\.codes is U8 \[4, 136\] instead of U8 \[4, 144\]"),
    "few state bits": (set_key("state_bits", 7), "state_bits 7, this gemq knows 8 to 16"),
    "many state bits": (set_key("state_bits", 17), "state_bits 17, this gemq knows 8 to 16"),
    "state bits true": (set_key("state_bits", True), "state_bits True"),
    "no state bits": (lambda tensors, values: values.pop("state_bits"), "state_bits None"),
    "other kind": (set_key("codes", "vector"), "codes are of the kind 'vector', this gemq knows affine and trellis"),
    "no kind": (lambda tensors, values: values.pop("codes"), "version 3 has no affine codes"),
    "old version": (set_key("format_version", 2), "version 2 has no trellis codes"),
    "new version": (set_key("format_version", 4), "format version 4 is not 2 or 3"),
    "codebook": (set_key("codebook", "lut"), "has the key 'codebook', which this gemq does not know"),
    "short rings": (change_tensor(CODES, lambda t: t[:, :-4]), r"codes is U8 \[4, 132\] instead of U8 \[4, 136\]"),
    "few tiles": (change_tensor(CODES, lambda t: t[:-1]), r"codes is U8 \[3, 136\] instead of"),
    "float scales": (change_tensor(SCALES, lambda t: t.float() * torch.nan), r"scales is F32 \[64\] instead of U8"),
    "scales of groups": (change_tensor(SCALES, lambda t: t[:, None]), r"scales is U8 \[64, 1\] instead of U8 \[64\]"),
    "no scales": (lambda tensors, values: tensors.pop(SCALES), r"2\.down_proj\.scales is missing"),
    "offsets": (
        lambda tensors, values: tensors.update({f"{EXPERTS}.2.down_proj.offsets": tensors[SCALES].clone()}),
        r"2\.down_proj\.offsets is not listed",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line_in_every_reader(tmp_path, checkpoint, kind):
    change, message = DAMAGE[kind]
    damaged = tmp_path / "damaged"
    damage(checkpoint, damaged, change)
    lines = set()
    for read in (
        gemq.load,
        AutoModelForCausalLM.from_pretrained,
        lambda directory: write_dense_checkpoint(directory, tmp_path / "twin"),
        check_checkpoint,
        inspect_checkpoint,
    ):
        with pytest.raises(UserError, match=message) as caught:
            read(damaged)
        lines.add(str(caught.value))
    assert len(lines) == 1
    assert "\n" not in lines.pop()
    assert not (tmp_path / "twin").exists()


def damage(source: Path, target: Path, change: Any) -> None:
    """Copies a checkpoint without its checksums and applies ``change(tensors, quantization_config)``."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    del config["gemq_checksums"]
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))


def test_affine_and_trellis_checkpoints_of_a_model_differ_only_in_experts(tmp_path, checkpoint):
    """Dense linears keep their affine codes."""
    affine = load_file(write_packed(tmp_path / "affine") / "model.safetensors")
    trellis = load_file(checkpoint / "model.safetensors")
    linears = [name for name in trellis if ".experts." not in name]
    assert any(name.endswith("q_proj.offsets") for name in linears)
    assert all(torch.equal(affine[name], trellis[name]) for name in linears)
