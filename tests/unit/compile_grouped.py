"""Compiles the kernels for many tokens without a GPU and prints JSON: [{"kernel", "arch", "shared" bytes}].

A program of its own, because the test process has told Triton to interpret.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from gemq.kernels import matmul, routing, unpack
from gemq.kernels.activation import NO_CLAMP, NONE, SILU

EIGHT_BITS, EVERY_WIDTH = unpack.width_bit(256), unpack.levels_mask([256])
TYPES = {"x": "*bf16", "codes": "*u8", "scales": "*u8", "offsets": "*u8", "table": "*i64", "bias": "*bf16"}
TYPES |= {"out": "*bf16", "order": "*i32", "starts": "*i32", "tiles": "*i32", "index": "*i64", "weights": "*fp32"}
TYPES |= {"y": "*bf16", "alpha": "fp32", "limit": "fp32", "shift": "fp32"}
ALIGNED = ("num_rows", "one_bits", "columns")


def compiled(fn: Any, arch: int, constants: dict[str, Any], warps: int = 4, stages: int = 3, **types: str) -> dict:
    signature = {n: "constexpr" if n in constants else (TYPES | types).get(n, "i32") for n in fn.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    source = triton.compiler.ASTSource(fn, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"kernel": f"{fn.__name__} {constants}", "arch": arch, "shared": kernel.metadata.shared}


def compiled_matmul(arch: int, config: matmul.Config, widths: int, dtype: str, **others: Any) -> dict:
    constants = {"WIDTHS": widths, "GROUPS": 16, "GROUP": 128, "HAS_BIAS": True, "ROUTED": True, "GATHER": 8}
    constants |= {"SCATTER": False, "GATED": True, "INTERLEAVED": False}
    constants |= {"ACTIVATION": SILU, "CLAMP": NO_CLAMP}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    constants |= others
    types = {name: f"*{dtype}" for name in ("x", "bias", "out")}
    return compiled(matmul._matmul_kernel, arch, constants, config.warps, config.stages, **types)


def main() -> None:
    configs = {matmul.config_for(pairs, 1, torch.bfloat16) for pairs in range(1, 1000)}
    kernels = []
    for arch in (89, 90):
        # Loops of different widths use shared memory one after the other; that of 8 bits needs most.
        kernels += [compiled_matmul(arch, config, EIGHT_BITS, "bf16") for config in sorted(configs)]
        kernels += [compiled_matmul(arch, matmul.config_for(1, 1, torch.float32), EIGHT_BITS, "fp32")]
    kernels += [compiled_matmul(90, max(configs), EVERY_WIDTH, "fp16")]
    linear = {"WIDTHS": unpack.width_bit(16), "ROUTED": False, "GATHER": 0, "ACTIVATION": NONE, "GATED": False}
    kernels += [compiled_matmul(90, matmul.config_for(17, 1, torch.bfloat16), linear.pop("WIDTHS"), "bf16", **linear)]
    kernels += [compiled(routing._sort_kernel, 90, {"BLOCK": 4096})]
    kernels += [compiled(routing._combine_kernel, 90, {"K": 8, "BLOCK": 1024})]
    dequantize = {"HAS_TABLE": True, "WIDTHS": EVERY_WIDTH, "GROUP": 128, "BLOCK": 128, "ROWS": 64}
    kernels += [compiled(unpack._dequantize_kernel, 90, dequantize)]
    print(json.dumps(kernels))


if __name__ == "__main__":
    main()
