"""How much memory vLLM's parameters take, against the bytes of the checkpoint: packed tensors plus dense parts.

Writes a random packed OLMoE of about ``--gigabytes`` (widths 1, 1.6, 2 and 3 mixed within every layer), loads it with
vLLM, generates a few tokens and adds up what its worker holds. Run in an environment with vLLM:

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/vllm_storage.py --gigabytes 1.1 --dir /tmp/random-packed
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.quant.widths import Width

WIDTHS = (Width.ONE_BIT, Width.TWO_BIT, Width.TERNARY, Width.THREE_BIT)
TENSORS = ("codes", "scales", "offsets")


def random_checkpoint(out: Path, gigabytes: float) -> None:
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from gemq.checkpoint.format import PackedFormat
    from gemq.checkpoint.model_shapes import matrix_shapes
    from gemq.checkpoint.save import dense_state, write_checkpoint

    def build(layers: int) -> tuple[Any, PackedFormat]:
        config = OlmoeConfig(num_hidden_layers=layers, vocab_size=8192)  # otherwise that of OLMoE-1B-7B
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.config.architectures = [type(model).__name__]
        widths = tuple(WIDTHS[e % len(WIDTHS)] for e in range(config.num_experts))
        paths = [f"model.layers.{i}" for i in range(layers)]
        experts = {f"{p}.mlp.experts": {"gate_up_proj": widths, "down_proj": widths} for p in paths}
        linears = {f"{p}.self_attn.{x}_proj": Width.FOUR_BIT for p in paths for x in "qkvo"}
        return model, PackedFormat(experts=experts, linears=linears)

    model, packed = build(1)
    layers = max(1, round(gigabytes * 1e9 / packed.total_bytes(matrix_shapes(model, packed))))
    model, packed = build(layers)
    expected = packed.expected(matrix_shapes(model, packed))
    generator = torch.Generator().manual_seed(0)

    def shards() -> Iterator[dict[str, Tensor]]:
        for name, spec in expected.items():
            if name.endswith(".codes"):  # below 243, so that every byte is a ternary one too
                yield {name: torch.randint(0, 243, spec.shape, dtype=torch.uint8, generator=generator)}
            else:  # a scale of 0.0107, and offsets that put the middle at zero
                yield {name: torch.full(spec.shape, 139 if name.endswith("scales") else 128, dtype=torch.uint8)}
        for name, tensor in dense_state(model, packed).items():
            yield {name: torch.randn(tensor.shape, generator=generator).mul(0.02).to(tensor.dtype)}

    write_checkpoint(out, config=model.config, packed_format=packed, shards=shards(), source=None)


def storage_bytes(model: Any) -> dict[str, int]:
    """Bytes of the distinct storages behind parameters and buffers, and of the tables of the packed experts."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    buffers = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.buffers()}
    tables = 0
    for module in model.modules():
        served = getattr(getattr(module, "quant_method", None), "_served", None)
        if served is not None:
            tables += sum(matrices.table.nbytes for matrices in served.experts.children())
    packed = ("_codes", "_scales", "_offsets", ".qweight", ".scales", ".offsets")
    return {
        "parameters": sum(storages.values()),
        "packed": sum(p.nbytes for name, p in model.named_parameters() if name.endswith(packed)),
        "buffers": sum(size for pointer, size in buffers.items() if pointer not in storages),
        "tables": tables,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--dir", type=Path, required=True, help="where the random checkpoint goes, or already is")
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # sends a function to the worker
    if not args.dir.exists():
        random_checkpoint(args.dir, args.gigabytes)

    from vllm import LLM, SamplingParams

    import vllm_storage  # this file, under a name that the worker can import
    from gemq.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(args.dir)
    packed_bytes = reader.format.total_bytes(reader.shapes)
    itemsize = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
    dense_bytes = 0
    for name in reader.unpacked:
        spec = reader.specs[name]
        dense_bytes += torch.Size(spec.shape).numel() * itemsize[spec.dtype]
    llm = LLM(str(args.dir), skip_tokenizer_init=True, max_model_len=64, max_num_seqs=1, enforce_eager=True)
    [memory] = llm.apply_model(vllm_storage.storage_bytes)
    sampling = SamplingParams(max_tokens=2, detokenize=False, temperature=0)
    tokens = llm.generate({"prompt_token_ids": [5, 6, 7]}, sampling)[0].outputs[0].token_ids
    total = memory["parameters"] + memory["tables"]
    result = {
        "packed_bytes": packed_bytes,
        "dense_bytes": dense_bytes,
        **{f"held_{name}": size for name, size in memory.items()},
        "ratio_packed": (memory["packed"] + memory["tables"]) / packed_bytes,
        "ratio": total / (packed_bytes + dense_bytes),
        "tokens": len(tokens),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
