"""How fast are products with packed weights for many tokens? Prints a table and appends one CSV row a measurement.

    python benchmarks/kernels_grouped.py [--shape olmoe ...] [--tokens 2048 ...] [--no-reference]
    python benchmarks/kernels_grouped.py --sweep [--shape olmoe] [--tokens 128 2048]
    python benchmarks/kernels_grouped.py --linear

Needs a GPU. Experts of one layer, bfloat16, against the same sorting and gate around torch's grouped product of dense
weights, against dequantizing the layer first, and against gemq's plain reference. Correctness is checked first. Each
step has fresh tokens and routing, and steps cycle over distinct weights of at least four times the L2 cache. Steps
are CUDA graphs (the reference, which waits for the GPU, is not); times are of single steps by events.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemq.quant.widths import TrellisWidth, Width
from record import RESULTS, append, environment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILE = RESULTS / "kernels_grouped.csv"
TOKENS = (17, 64, 128, 512, 2048, 8192)
STEPS = 8  # distinct steps; each is a graph of its own
REPEATS = 5


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    widths: tuple[Width | TrellisWidth, ...]


TRELLIS_TWO_BITS: tuple[Width | TrellisWidth, ...] = tuple(
    TrellisWidth(eighths) for eighths in (10, 12, 14, 16, 16, 18, 20, 22)
)
TRELLIS_TWO_AND_A_HALF_BITS = tuple(TrellisWidth(eighths) for eighths in (16, 18, 20, 20, 20, 20, 22, 24))

SHAPES = {
    # 15 : 45 : 99 : 33 of 192, an average of 2.0 nominal bits
    "olmoe": Shape(
        2048,
        1024,
        64,
        8,
        (Width.ONE_BIT,) * 5 + (Width.TERNARY,) * 15 + (Width.TWO_BIT,) * 33 + (Width.THREE_BIT,) * 11,
    ),
    "mixtral": Shape(4096, 14336, 8, 2, (Width.TWO_BIT, Width.THREE_BIT) * 4),
    "olmoe-trellis": Shape(2048, 1024, 64, 8, TRELLIS_TWO_BITS * 8),
    "mixtral-trellis": Shape(4096, 14336, 8, 2, TRELLIS_TWO_AND_A_HALF_BITS),
}
CONFIGS = (  # block_m, block_n, block_k, warps, stages
    *((16, 64, 128, 4, 2), (16, 64, 128, 4, 3), (16, 64, 128, 4, 4), (16, 128, 128, 8, 3)),
    *((32, 64, 128, 4, 2), (32, 64, 128, 4, 3), (32, 128, 128, 8, 3)),
    *((64, 64, 128, 4, 2), (64, 128, 128, 8, 2), (64, 128, 64, 8, 3)),
    *((128, 64, 128, 4, 2), (128, 128, 128, 8, 2), (128, 128, 64, 8, 2), (256, 128, 32, 8, 2)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--no-reference", action="store_true", help="leave out the plain reference, which is slow")
    parser.add_argument(
        "--sweep", action="store_true", help="try tile configurations of affine codes instead; writes no rows"
    )
    parser.add_argument("--linear", action="store_true", help="dense linears of 4 and 8 bits instead")
    parser.add_argument("--csv", type=Path, default=FILE)
    args = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("kernels_grouped.py: needs a CUDA device")
    torch.manual_seed(0)
    if args.linear:
        bench_linears(args)
        return
    for name in args.shape:
        layers = make_layers(SHAPES[name])
        check(name, SHAPES[name], layers)
        (sweep if args.sweep else bench_experts)(args, name, SHAPES[name], layers)
        del layers
        torch.cuda.empty_cache()


# What is measured


def make_layers(shape: Shape) -> list[Any]:
    """Packed layers with random codes, together at least four times the L2 cache."""
    import torch

    min_bytes = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    layers: list[Any] = []
    total = 0
    while total < min_bytes or len(layers) < 2:
        layers.append(make_layer(shape))
        total += sum(b.nbytes for b in layers[-1].buffers())
    return layers


def make_layer(shape: Shape) -> Any:
    from torch import nn

    from gemq.kernels.modules import PackedExperts, PackedMatrices
    from gemq.kernels.trellis.experts import TrellisMatrices

    class Experts(PackedExperts):
        has_gate, has_bias = True, False

        def __init__(self) -> None:
            super().__init__()
            self.act_fn = nn.SiLU()

        def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
            gate, up = y.chunk(2, dim=-1)
            return self.act_fn(gate) * up

    layer = Experts()
    for name, rows, columns in (
        ("gate_up_proj", 2 * shape.intermediate, shape.hidden),
        ("down_proj", shape.hidden, shape.intermediate),
    ):
        if isinstance(shape.widths[0], TrellisWidth):
            setattr(layer, name, TrellisMatrices([random_trellis(rows, columns, width) for width in shape.widths]))
        else:
            setattr(layer, name, PackedMatrices([random_matrix(rows, columns, width) for width in shape.widths]))
    return layer


def random_trellis(rows: int, columns: int, width: Any) -> Any:
    """Weights of variance about 1 / columns."""
    import torch

    from gemq.quant.grid import encode_scales
    from gemq.quant.trellis import STATE_BITS
    from gemq.quant.trellis_matrix import TrellisMatrix

    codes = torch.randint(0, 256, (rows // 16, columns // 4 * width.eighths), dtype=torch.uint8, device="cuda")
    scales = (0.8 + 0.4 * torch.rand(rows, device="cuda")) * columns**-0.5
    return TrellisMatrix(codes, encode_scales(scales), width, STATE_BITS)


def kernels_of(layer: Any) -> Any:
    """The module of kernels that runs a layer."""
    from gemq.kernels.grouped import operators
    from gemq.kernels.trellis import grouped
    from gemq.kernels.trellis.experts import TrellisMatrices

    return grouped if isinstance(layer.down_proj, TrellisMatrices) else operators


def random_matrix(rows: int, columns: int, width: Any) -> Any:
    """Weights of variance about 1 / columns: outputs neither grow nor vanish."""
    import torch

    from gemq.quant.grid import encode
    from gemq.quant.packing import PackedMatrix
    from shapes import random_codes

    groups, levels = columns // 128, width.levels
    codes = random_codes(rows, groups, width, 128, torch.Generator("cuda").manual_seed(torch.initial_seed()))
    scales = (1 + torch.rand(rows, groups, device="cuda")) * 2.3 / (levels * columns**0.5)
    offsets = -scales * (levels - 1) / 2 * (0.8 + 0.4 * torch.rand(rows, groups, device="cuda"))
    return PackedMatrix(codes, *encode(scales, offsets, levels - 1), width)


def routings(shape: Shape, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """STEPS fresh draws of (hidden, top_k_index, top_k_weights)."""
    import torch

    draws = []
    for _ in range(STEPS):
        hidden = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
        scores, index = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k, dim=1)
        draws.append((hidden, index, scores.softmax(1)))
    return draws


def dense_forward(
    first: Tensor, down: Tensor, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> torch.Tensor:
    """first [E, 2 I, H], down [E, H, I]: sorted pairs and torch's grouped product, as Transformers computes it."""
    import torch
    from torch.nn import functional as F

    tokens, k = top_k_index.shape
    expert, order = torch.sort(top_k_index.flatten())
    counts = torch.histc(expert.int(), bins=first.shape[0], min=0, max=first.shape[0] - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    y = torch._grouped_mm(hidden[order // k], first.transpose(1, 2), offs=ends)
    gate, up = y.chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    y = y * top_k_weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(tokens, k, -1).sum(1).to(hidden.dtype)


def dequantized(matrices: Any) -> Tensor:
    import torch

    from gemq.kernels.grouped.dequantize import dequantize
    from gemq.kernels.grouped.operators import packed_experts
    from gemq.kernels.trellis.dense import trellis_weight
    from gemq.kernels.trellis.experts import TrellisMatrices
    from gemq.quant.grid import decode_scales

    if isinstance(matrices, TrellisMatrices):
        return trellis_weight(matrices, decode_scales(matrices.scales), dtype=torch.bfloat16)
    w = packed_experts(matrices, None)
    return dequantize(w, matrices.columns, torch.bfloat16)


def check(name: str, shape: Shape, layers: list[Any]) -> None:
    """Stops if the kernels are further from float64 than twice the reference's distance."""
    from gemq.kernels import reference

    kernels = kernels_of(layers[0])
    for tokens in (33, 300):
        hidden, index, weights = routings(shape, tokens)[0]
        truth = reference.experts_forward(layers[0], hidden.double(), index, weights.double())
        errors = [
            ((f(layers[0], hidden, index, weights).double() - truth).norm() / truth.norm()).item()
            for f in (kernels.experts_forward, reference.experts_forward)
        ]
        print(f"{name}, {tokens} tokens: relative error {errors[0]:.2e}, reference {errors[1]:.2e}")
        if not errors[0] <= 2 * errors[1]:
            sys.exit("kernels_grouped.py: wrong results")


# How it is measured


def time_steps(steps: list[Callable[[], Any]], graph: bool = True) -> tuple[float, float, float]:
    """p20, p50, p80 of a single step in seconds."""
    import torch

    for step in steps[:2]:
        step()
    torch.cuda.synchronize()
    if graph:
        graphs, pool = [], None
        for step in steps:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, pool=pool):
                step()
            pool = pool or captured.pool()
            graphs.append(captured)
        steps = [g.replay for g in graphs]
        for step in steps:
            step()
    times = []
    for _ in range(REPEATS if graph else 1):
        for step in steps:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            times.append((begin, end))
    torch.cuda.synchronize()
    seconds = sorted(b.elapsed_time(e) / 1e3 for b, e in times)
    p20, p50, p80 = statistics.quantiles(seconds, n=10)[1::3] if len(seconds) > 1 else seconds * 3
    return p20, p50, p80


def cycle(layers: list[Any], draws: list[Any], call: Callable[..., Any]) -> list[Callable[[], Any]]:
    return [lambda i=i, draw=draw: call(layers[i % len(layers)], *draw) for i, draw in enumerate(draws)]  # type: ignore[misc]


def bench_experts(args: argparse.Namespace, name: str, shape: Shape, layers: list[Any]) -> None:
    import torch

    from gemq.kernels import reference
    from gemq.kernels.activation import activation_of

    def through_dense(layer: Any, *draw: Tensor) -> Tensor:
        return dense_forward(dequantized(layer.gate_up_proj), dequantized(layer.down_proj), *draw)

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    dense = [(dequantized(layer.gate_up_proj), dequantized(layer.down_proj)) for layer in layers[:1]]
    for layer in layers:
        activation_of(layer)  # tries it out at first use, which a graph's capture does not allow
    assert sum(w.nbytes for w in dense[0]) > 4 * l2
    for tokens in args.tokens:
        draws = routings(shape, tokens)
        load = torch.stack([torch.bincount(d[1].flatten(), minlength=shape.experts) for d in draws]).float()
        imbalance = (load.amax(1) / load.mean(1)).mean().item()
        flops = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.intermediate
        ways: dict[str, tuple[list[Callable[[], Any]], bool]] = {
            "dense": (cycle(dense, draws, lambda ws, *draw: dense_forward(*ws, *draw)), True),
            "packed": (cycle(layers, draws, kernels_of(layers[0]).experts_forward), True),
            "dequantize+dense": (cycle(layers, draws, through_dense), True),
        }
        if not args.no_reference and tokens <= 2048:
            ways["reference"] = (cycle(layers, draws[:4], reference.experts_forward), False)
        base = None
        for way, (steps, graph) in ways.items():
            times = time_steps(steps, graph)
            base = base or times[1]
            row = {"kernel": "experts", "shape": name, "tokens": tokens, "way": way, "imbalance": imbalance}
            write(args.csv, row, times, flops, base)
            torch.cuda.empty_cache()


def bench_linears(args: argparse.Namespace) -> None:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from gemq.kernels.grouped import operators
    from gemq.kernels.grouped.matmul import config_for, matmul
    from gemq.kernels.modules import PackedLinear

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    for rows, columns, width in (
        (2048, 2048, Width.FOUR_BIT),
        (4096, 4096, Width.FOUR_BIT),
        (4096, 4096, Width.EIGHT_BIT),
        (14336, 4096, Width.FOUR_BIT),
    ):
        modules, dense, total = [], [], 0
        while total < 4 * l2:
            linear = nn.Linear(columns, rows, bias=False, device="meta")
            modules.append(PackedLinear.from_linear(linear, random_matrix(rows, columns, width)))
            dense.append(modules[-1].dequantize(torch.bfloat16))
            total += modules[-1].codes.nbytes

        def fused(module: Any, x: Tensor) -> Tensor:
            return matmul(x, operators.packed_linear(module), config_for(x.shape[0], 1, x.dtype), None)

        def through_dense(module: Any, x: Tensor) -> Tensor:
            return operators.linear_dequantized(x, operators.packed_linear(module))

        for tokens in args.tokens:
            draws = [(torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16),) for _ in range(len(modules))]
            truth = draws[0][0].double() @ modules[0].dequantize(torch.float32).double().T
            for way in (fused, through_dense):
                error = ((way(modules[0], *draws[0]).double() - truth).norm() / truth.norm()).item()
                if not error < 8e-3:
                    sys.exit(f"kernels_grouped.py: wrong results of {way.__name__}, relative error {error:.1e}")
            base = None
            for way_name, weights, call in (
                ("dense", dense, lambda w, x: F.linear(x, w)),
                ("packed", modules, fused),
                ("dequantize+dense", modules, through_dense),
            ):
                times = time_steps(cycle(weights, draws, call))
                base = base or times[1]
                shape = f"{rows}x{columns}x{width}bit"
                row = {"kernel": "linear", "shape": shape, "tokens": tokens, "way": way_name, "imbalance": ""}
                write(args.csv, row, times, 2 * tokens * rows * columns, base)


def sweep(args: argparse.Namespace, name: str, shape: Shape, layers: list[Any]) -> None:
    """Every configuration whose tile suits the mean load, and where the time of the chosen one goes."""
    import torch
    import triton

    from gemq.kernels.grouped import operators
    from gemq.kernels.grouped.matmul import TileConfig, config_for, matmul
    from gemq.kernels.grouped.routing import combine, sort_pairs

    for tokens in args.tokens:
        draws = routings(shape, tokens)
        mean = tokens * shape.top_k / shape.experts
        chosen = config_for(tokens * shape.top_k, shape.experts, torch.bfloat16)
        print(f"\n{name}, {tokens} tokens, {mean:.0f} pairs an expert; chosen {tuple(chosen)}")
        flops = 2 * tokens * shape.top_k * 3 * shape.hidden * shape.intermediate
        for config in [TileConfig(*c) for c in CONFIGS if mean / 4 <= c[0] <= max(4 * mean, 16) or c[0] >= 128 <= mean]:
            try:
                _, p50, _ = time_steps(cycle(layers, draws, partial(packed_experts_output, config=config)))
                print(f"  {tuple(config)!s:28} {p50 * 1e6:9.1f} us {flops / p50 / 1e12:7.1f} TFLOP/s", flush=True)
            except triton.runtime.errors.OutOfResources as error:
                print(f"  {tuple(config)!s:28} {error}")

        layer, (hidden, index, weights) = layers[0], draws[0]
        first, down = (operators.packed_experts(w, None) for w in (layer.gate_up_proj, layer.down_proj))
        activation = operators.activation_of(layer) or operators.RAW
        routing = sort_pairs(index, shape.experts, chosen.block_m)
        h = matmul(hidden, first, chosen, routing, top_k=shape.top_k, activation=activation)
        y = matmul(h, down, chosen, routing, scatter=True)
        for step_name, step in {
            "sort": lambda: sort_pairs(index, shape.experts, chosen.block_m),  # noqa: B023
            "first": lambda: matmul(hidden, first, chosen, routing, top_k=shape.top_k, activation=activation),  # noqa: B023
            "down": lambda: matmul(h, down, chosen, routing, scatter=True),  # noqa: B023
            "combine": lambda: combine(y, index, weights, shape.experts),  # noqa: B023
        }.items():
            print(f"    {step_name:8} {time_steps([step] * 8)[1] * 1e6:9.1f} us, same weights each time")


def packed_experts_output(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor, config: Any) -> Tensor:
    from gemq.kernels.grouped import operators

    first, down = (operators.packed_experts(w, None) for w in (layer.gate_up_proj, layer.down_proj))
    return operators.experts(
        hidden, index, weights, first, down, operators.activation_of(layer) or operators.RAW, config
    )


def write(path: Path, row: dict[str, Any], times: tuple[float, float, float], flops: int, base: float) -> None:
    row |= {f"p{p}_us": t * 1e6 for p, t in zip((20, 50, 80), times, strict=True)}
    row |= {"tflops": flops / times[1] / 1e12, "speed_over_dense": base / times[1]}
    print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    append(path, row | environment())


if __name__ == "__main__":
    main()
