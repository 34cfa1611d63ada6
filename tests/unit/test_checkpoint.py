"""Packed checkpoints: written, verified, loaded into Transformers and compared with a fake-quantized twin.

The twin is an ordinary model whose weights were quantized and dequantized here, in this file, so that
packing, format, loading and kernels are all on one side of the comparison only.
"""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

import gemq
from gemq import UserError
from gemq.checkpoint import save
from gemq.checkpoint.dense_export import write_dense_checkpoint
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.model_shapes import matrix_shapes
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.evaluation.evaluate import open_model
from gemq.kernels import modules as packed_modules
from gemq.quant.grid import Quantized, dequantize, nearest
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for
from gemq.runtime.files import disk_errors
from gemq.runtime.safetensors_files import read_header

pytestmark = pytest.mark.sample  # loading differs most between versions of Transformers
torch.set_num_threads(1)

WIDTHS = tuple(Width)  # one expert of each in every layer
COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "olmoe": lambda: OlmoeConfig(**COMMON, intermediate_size=32, num_experts=6),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=6,
        tie_word_embeddings=True,
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=32, num_local_experts=6),
    "gpt_oss": lambda: GptOssConfig(**COMMON, intermediate_size=32, num_local_experts=6, head_dim=16),
}
TOKENS = torch.arange(3, 43).reshape(2, 20)


@dataclass
class Written:
    packed: Path
    twin: Path
    format: PackedFormat
    shapes: dict[str, tuple[int, int]]


def round_to_nearest(weight: torch.Tensor, width: Width, group_size: int) -> Quantized:
    groups = weight.float().unflatten(-1, (-1, group_size))
    scales, offsets = (groups.amax(-1) - groups.amin(-1)) / (width.max_code), groups.amin(-1)
    scales, offsets = nearest(scales, offsets, width.max_code)
    codes = ((groups - offsets[..., None]) / scales[..., None]).round()
    return Quantized(codes.clamp(0, width.max_code).to(torch.uint8).flatten(-2), scales, offsets)


def format_of(model: PreTrainedModel) -> PackedFormat:
    """Widths 1 to 8 over the experts of each layer, rotated; dense linears at 4 bits."""
    experts, linears = {}, {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            turn = len(experts)
            widths = WIDTHS[turn:] + WIDTHS[:turn]
            experts[path] = {"gate_up_proj": widths, "down_proj": widths[::-1]}
        elif isinstance(module, torch.nn.Linear) and not path.endswith(("lm_head", "gate", "router")):
            linears[path] = Width.FOUR_BIT
    return PackedFormat(experts=experts, linears=linears, group_size=64)


def test_layers_are_read_in_the_models_order():
    """config.json sorts its keys: layer 10 stands before layer 2 there, and would in ``gemq inspect``."""
    experts = {
        f"model.layers.{i}.mlp.experts": {"down_proj": (Width(i % 3 + 1),), "up_proj": (Width.TWO_BIT,)}
        for i in range(12)
    }
    linears = {f"model.layers.{i}.self_attn.{name}_proj": Width.FOUR_BIT for i in range(12) for name in "qk"}
    packed = PackedFormat(experts=experts, linears=linears, group_size=64)
    read = PackedFormat.from_dict(json.loads(json.dumps(packed.to_dict(), sort_keys=True)))
    assert list(read.experts) == list(experts)
    assert [path.split(".")[2] for path in read.linears] == [str(i) for i in range(12) for _ in "qk"]


def quantize_in_place(model: PreTrainedModel, packed_format: PackedFormat) -> dict[str, torch.Tensor]:
    """Fake-quantizes the model's weights and returns the same weights packed, under their names."""
    tensors = {}
    state = model.state_dict()
    shapes = matrix_shapes(model, packed_format)
    for name, kind, width in packed_format.matrices():
        if kind in packed_format.linears:
            target = state[f"{kind}.weight"]
        else:
            path = kind.rpartition(".")[0]
            target = state[kind][int(name.split(".")[-2])]
            if model.get_submodule(path).is_transposed:
                target = target.T
        group_size = group_size_for(shapes[kind][1], packed_format.group_size)
        q = round_to_nearest(target, width, group_size)
        target.copy_(dequantize(q, target.dtype))
        tensors.update(PackedMatrix.pack(q, width).named(name))
    return tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Builds each family once: ``written(family)``."""
    cache: dict[str, Written] = {}

    def build(family: str) -> Written:
        if family in cache:
            return cache[family]
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(family)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default: a lost bias would go unseen
                torch.nn.init.normal_(parameter, std=0.2)
        source = folder / "source"
        source.mkdir()
        (source / "tokenizer.json").write_text("{}")
        (source / "model.safetensors.index.json").write_text("{}")
        packed_format = format_of(model)
        tensors = quantize_in_place(model, packed_format)
        write_checkpoint(
            folder / "packed",
            config=model.config,
            packed_format=packed_format,
            shards=[tensors, dense_state(model, packed_format)],
            source=source,
            shard_bytes=60_000,
        )
        model.save_pretrained(folder / "twin")
        cache[family] = Written(folder / "packed", folder / "twin", packed_format, matrix_shapes(model, packed_format))
        return cache[family]

    return build


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load_twin(path: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def copy_with(packed: Path, out: Path, change) -> Path:
    """A copy of a checkpoint in one file, with ``change(tensors, config)`` applied."""
    tensors = {}
    for file in packed.glob("*.safetensors"):
        tensors.update(load_file(file))
    config = json.loads((packed / "config.json").read_text())
    change(tensors, config)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_twin(written, family):
    w = written(family)
    packed = logits(gemq.load(w.packed))
    assert packed.dtype == torch.bfloat16
    reference = logits(load_twin(w.twin))
    if family == "gpt_oss":
        # Its eager experts multiply x @ W with W stored transposed: same numbers, another order of sums.
        # Logits are about 10, where a bf16 rounding step is 2^-5.
        torch.testing.assert_close(packed, reference, rtol=2**-5, atol=2**-4)
    else:
        assert torch.equal(packed, reference)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_logits_in_float32(written, family):
    """In float32 weights are not rounded to bf16 as the twin's are, so the twin is a float32 one."""
    w = written(family)
    model = gemq.load(w.packed, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    twin_dir = w.packed.parent / "twin32"
    if not twin_dir.exists():
        write_dense_checkpoint(w.packed, twin_dir, torch.float32)
    # Same weights to the bit and the same products; what is left is the order of sums inside a product.
    torch.testing.assert_close(logits(model), logits(load_twin(twin_dir, torch.float32)), rtol=1e-5, atol=1e-5)


def test_plain_from_pretrained_after_import(written):
    """A fresh process: ``import gemq`` first, which must load neither torch nor Transformers."""
    code = f"""
import gemq, sys
assert not {{"torch", "transformers"}} & set(sys.modules)
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(written("olmoe").packed)!r})
import torch
torch.set_num_threads(1)
with torch.no_grad():
    print(model(torch.arange(3, 43).reshape(2, 20)).logits.float().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == logits(gemq.load(written("olmoe").packed)).float().sum().item()


def test_load_in_a_fresh_interpreter(written):
    """Importing ``load`` imports Transformers' registry, which looks for gemq then."""
    code = "from gemq.checkpoint.load import load, register; import sys; load(sys.argv[1]); register()"
    subprocess.run([sys.executable, "-c", code, written("olmoe").packed], check=True, capture_output=True)


def test_stored_bytes_and_files(written):
    w = written("olmoe")
    files = {f.name for f in w.packed.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    headers = {}
    for file in w.packed.glob("*.safetensors"):
        headers.update(read_header(file))
    expected = w.format.expected(w.shapes)
    assert {name: headers[name] for name in expected} == expected
    index = json.loads((w.packed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == headers.keys()
    modes = {f.stat().st_mode for f in w.packed.iterdir()}
    assert len(modes) == 1  # safetensors alone would make weights that only their owner can read
    stored = sum(t.nbytes for f in w.packed.glob("*.safetensors") for n, t in load_file(f).items() if n in expected)
    assert stored == w.format.total_bytes(w.shapes)
    assert stored == sum(
        m.width.matrix_bytes(*w.shapes[m.kind], group_size_for(w.shapes[m.kind][1], 64)) for m in w.format.matrices()
    )
    # The dense rest carries hub names; nothing is stored twice.
    assert not any("experts.gate_up_proj" in name for name in headers)


def test_tied_weights_are_stored_once(written):
    names = {n for f in written("qwen2_moe").packed.glob("*.safetensors") for n in read_header(f)}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_format_round_trip(written):
    packed_format = written("olmoe").format
    assert PackedFormat.from_dict(json.loads(json.dumps(packed_format.to_dict()))) == packed_format


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_save_pretrained_round_trip(written, tmp_path, family):
    w = written(family)
    model = gemq.load(w.packed)
    original = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(gemq.load(tmp_path / "again")), original)
    state = model.state_dict()
    for name, spec in w.format.expected(w.shapes).items():
        assert tuple(state[name].shape) == spec.shape
        assert (state[name].dtype, spec.dtype) == (torch.uint8, "U8")
    # The twin reads what save_pretrained wrote just as well.
    write_dense_checkpoint(tmp_path / "again", tmp_path / "dense")
    assert torch.equal(logits(load_twin(tmp_path / "dense")), logits(load_twin(w.twin)))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_twin(written, tmp_path, family):
    w = written(family)
    write_dense_checkpoint(w.packed, tmp_path / "dense")
    assert torch.equal(logits(load_twin(tmp_path / "dense")), logits(load_twin(w.twin)))
    names = [{n for f in d.glob("*.safetensors") for n in read_header(f)} for d in (tmp_path / "dense", w.twin)]
    assert names[0] == names[1]


def test_load_state_dict_round_trip(written):
    model = gemq.load(written("olmoe").packed)
    original, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    for name, buffer in model.named_buffers():
        if name.endswith("codes"):
            buffer.zero_()
    assert not torch.equal(logits(model), original)
    model.load_state_dict(state)
    assert torch.equal(logits(model), original)
    del state["model.layers.1.mlp.experts.5.down_proj.scales"]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.5\.down_proj\.scales"):
        model.load_state_dict(state)


def test_casts_leave_scales_alone(written):
    model = gemq.load(written("qwen2_moe").packed)
    experts, linear = model.model.layers[0].mlp.experts, model.model.layers[0].self_attn.q_proj
    original = (
        experts.down_proj.scales.clone(),
        linear.offsets.clone(),
        experts.down_proj.dequantize(0, torch.float32),
    )
    # model.half() and the like are refused by Transformers for any quantized model; modules take them.
    casts = (
        lambda: model.to(torch.float32),
        model.model.half,
        model.model.bfloat16,
        lambda: model.to(torch.float32),
    )
    for cast in casts:
        cast()
        assert torch.equal(experts.down_proj.scales, original[0])
        assert torch.equal(linear.offsets, original[1])
        assert torch.equal(experts.down_proj.dequantize(0, torch.float32), original[2])
    assert logits(model).dtype == torch.float32


def missing(tensors, config):
    del tensors["model.layers.1.mlp.experts.3.down_proj.scales"]


def wrong_size(tensors, config):
    tensors["model.layers.0.mlp.experts.0.gate_up_proj.codes"] = torch.zeros(64, 3, dtype=torch.uint8)


def wrong_dtype(tensors, config):
    name = "model.layers.0.self_attn.q_proj.scales"
    tensors[name] = tensors[name].float()


def changed_width(tensors, config):
    config["quantization_config"]["experts"]["model.layers.0.mlp.experts"]["down_proj"][2] = 4


def unlisted_linear(tensors, config):
    del config["quantization_config"]["linears"]["model.layers.0.self_attn.q_proj"]


def wrong_group_size(tensors, config):
    config["quantization_config"]["group_size"] = 32


def odd_group_size(tensors, config):
    config["quantization_config"]["group_size"] = 48


def unknown_version(tensors, config):
    config["quantization_config"]["format_version"] = 1


def unknown_width(tensors, config):
    config["quantization_config"]["linears"]["model.layers.0.self_attn.q_proj"] = 5


def uneven_counts(tensors, config):
    config["quantization_config"]["experts"]["model.layers.0.mlp.experts"]["down_proj"].pop()


def too_few_experts(tensors, config):
    for widths in config["quantization_config"]["experts"]["model.layers.0.mlp.experts"].values():
        widths.pop()


def unknown_path(tensors, config):
    config["quantization_config"]["linears"]["model.layers.9.self_attn.q_proj"] = 4


DAMAGE = {
    missing: r"1 packed tensors .*layers\.1\.mlp\.experts\.3\.down_proj\.scales is missing",
    wrong_size: r"1 packed tensors .*experts\.0\.gate_up_proj\.codes is U8 \[64, 3\] instead of U8 \[64, 8\]",
    wrong_dtype: r"q_proj\.scales is F32",
    changed_width: r"experts\.2\.down_proj\.codes is U8",
    unlisted_linear: r"q_proj\.codes is not listed in config\.json",
    wrong_group_size: r"packed tensors do not match",
    odd_group_size: r"group_size 48",
    unknown_version: r"format version 1 is not 2",
    unknown_width: r"no width 5",
    uneven_counts: r"list 5 and 6 experts",
    too_few_experts: r"5 widths for the 6 experts",
    unknown_path: r"no model\.layers\.9",
}


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_damage_is_one_clear_error(written, tmp_path, change):
    """Through plain ``from_pretrained`` too: Transformers itself would only warn, or in 5.17 say nothing."""
    damaged = copy_with(written("olmoe").packed, tmp_path / "damaged", change)
    for read in (gemq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=DAMAGE[change]) as caught:
            read(damaged)
        assert "\n" not in str(caught.value)


def test_truncated_file(written, tmp_path):
    damaged = copy_with(written("olmoe").packed, tmp_path / "damaged", lambda tensors, config: None)
    assert torch.equal(logits(gemq.load(damaged)), logits(gemq.load(written("olmoe").packed)))
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for read in (
        gemq.load,
        AutoModelForCausalLM.from_pretrained,
        lambda d: write_dense_checkpoint(d, tmp_path / "x"),
    ):
        with pytest.raises(UserError, match="copy the checkpoint again"):
            read(damaged)


@pytest.mark.parametrize("change", ["missing", "instead of"])
def test_damaged_dense_tensor(written, tmp_path, change):
    def damage(tensors, config):
        name = "model.layers.0.mlp.gate.weight"
        tensors[name] = tensors[name][:-1].clone()
        if change == "missing":
            del tensors[name]
        config["architectures"] = ["OlmoeForCausalLM"]

    damaged = copy_with(written("olmoe").packed, tmp_path / "damaged", damage)
    for read in (gemq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=rf"1 unpacked tensors .*layers\.0\.mlp\.gate\.weight .*{change}"):
            read(damaged)


def test_load_refuses_other_directories(written, tmp_path):
    with pytest.raises(UserError, match="not a gemq checkpoint"):
        gemq.load(written("olmoe").twin)
    with pytest.raises(UserError, match="no readable config"):
        gemq.load(tmp_path)


@pytest.mark.parametrize("quant_method", [None, "GEMQ", "fp8"])
def test_a_damaged_quant_method_is_named(written, tmp_path, quant_method):
    """Other methods would be told to give the full-precision model, or the tensors that have no place."""

    def damage(tensors, config):
        config["quantization_config"]["quant_method"] = quant_method

    damaged = copy_with(written("olmoe").packed, tmp_path / "damaged", damage)
    for read in (gemq.load, gemq.inspect, gemq.evaluate, open_damaged):
        with pytest.raises(UserError, match="settings of gemq, but its quant_method is not 'gemq'"):
            read(damaged)


def open_damaged(path):
    """As ``gemq generate`` and ``gemq bench`` do."""
    return open_model(str(path), "auto", "cpu")


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(written, device_map):
    packed = written("olmoe").packed
    model = gemq.load(packed, device_map=device_map)
    assert torch.equal(logits(model), logits(gemq.load(packed, device="auto").cpu()))
    assert not model.training


def test_one_expert_is_dequantized_at_a_time(written, monkeypatch):
    """Under autograd too, where a plain product would keep each dequantized matrix for backward."""
    import weakref

    alive: weakref.WeakSet = weakref.WeakSet()
    max_alive, calls = 0, 0

    def counting(q, dtype=torch.float32):
        nonlocal max_alive, calls
        weight = dequantize(q, dtype)
        alive.add(weight)
        max_alive, calls = max(max_alive, len(alive)), calls + 1
        return weight

    monkeypatch.setattr(packed_modules, "dequantize", counting)
    model = gemq.load(written("olmoe").packed)
    model(TOKENS[:, :1]).logits.sum().backward()
    # 2 layers, each at most 6 experts of 2 matrices and 4 linears, forward and backward.
    assert 0 < calls <= 2 * 2 * (2 * 6 + 4)
    assert max_alive <= 2  # the one in use and, until the next assignment, the one before
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_gradients_equal_the_twins(written):
    """float32; activations, routers, norms and biases get the gradients of the dequantized model."""
    w = written("qwen2_moe")
    twin_dir = w.packed.parent / "twin32"
    if not twin_dir.exists():
        write_dense_checkpoint(w.packed, twin_dir, torch.float32)
    models = gemq.load(w.packed, dtype=torch.float32), load_twin(twin_dir, torch.float32)
    for model in models:
        model(TOKENS, labels=TOKENS).loss.backward()
    twin = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter.grad, twin[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_sentinel_indices_are_skipped(written):
    experts = gemq.load(written("olmoe").packed, dtype=torch.float32).model.layers[0].mlp.experts
    hidden, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.tensor([[0, 6], [6, 7], [5, 2], [3, 6], [1, 4]])
    out = experts(hidden, index, weights)
    expected = experts(hidden, index.clamp(max=5), weights * (index < 6))
    torch.testing.assert_close(out, expected)
    assert torch.equal(out[1], torch.zeros(64))


def test_generate(written):
    model = gemq.load(written("olmoe").packed)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 23)


def write_small(out: Path, shards) -> None:
    config = FAMILIES["olmoe"]()
    write_checkpoint(
        out,
        config=config,
        packed_format=PackedFormat(),
        shards=shards,
        source=None,
        shard_bytes=8,
    )


def test_failure_leaves_nothing(tmp_path):
    def broken():
        yield {"a": torch.zeros(4)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_small(tmp_path / "out", broken())
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_are_user_errors(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(UserError, match=r"disk is full.*free some space"):
        write_small(tmp_path / "out", [{"a": torch.zeros(4)}])
    assert list(tmp_path.iterdir()) == []


def test_errors_inside_safetensors_are_user_errors(tmp_path):
    """safetensors hides the OSError but tells its number: here a directory that went away (ENOENT)."""
    with (
        pytest.raises(UserError, match=r"cannot write .* \(No such file or directory\)"),
        disk_errors(tmp_path),
    ):
        save_file({"a": torch.zeros(4)}, tmp_path / "gone" / "x.safetensors")
    with pytest.raises(UserError, match="disk is full"), disk_errors(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_existing_output(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("x")
    out.mkdir()  # empty: fine
    write_small(out, [{"a": torch.zeros(4)}, {"b": torch.ones(4)}])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
    assert not (out / "stale").exists()
    with pytest.raises(UserError, match="not an empty directory"):
        write_small(out, [])


def test_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        write_small(tmp_path / name, [{"a": torch.zeros(4), "b": torch.ones(2)}, {"c": torch.ones(4)}])
    files, files_again = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert files == files_again
    assert len([name for name in files if name.endswith(".safetensors")]) == 3


def test_absent_packed_tensor_is_not_written(written, tmp_path):
    with pytest.raises(ValueError, match="packed tensors were not given"):
        write_checkpoint(
            tmp_path / "out",
            config=FAMILIES["olmoe"](),
            packed_format=written("olmoe").format,
            shards=[],
            source=None,
        )
    assert list(tmp_path.iterdir()) == []
