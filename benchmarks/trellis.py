"""How accurate are trellis codes, and how long does encoding take?

    python benchmarks/trellis.py [--state-bits 12 14 16] [--bits 1 1.5 2 2.5 3] [--tiles 16384]
    python benchmarks/trellis.py --codebooks [--state-bits 12 14] [--bits 1 2 3]
    python benchmarks/trellis.py --matrices [--bits 2]
    python benchmarks/trellis.py --model DIR --text FILE [--layer 3] [--experts 4] [--bits 1 2 3]

The first compares the kernels with the reference, encodes tiles of unit Gaussians and prints the mean squared error
and the time, also for all 6.4 billion expert weights of OLMoE-1B-7B. The second compares functions that give states
their values. The third times error feedback for matrices of OLMoE's size. The last compares the weighted error
tr(D H D^T) of trellis codes with that of scalar GPTQ on experts of a model with Transformers' OLMoE layers. All run on
a GPU with the kernels, without one on the CPU with the reference (use few tiles there). The first appends rows to
results/trellis.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.quant import trellis, trellis_feedback
from gemq.quant.gptq import gptq
from gemq.quant.grid import Quantized, dequantize
from gemq.quant.hessian import factorize
from gemq.quant.trellis_quantize import quantize, rotated_problem
from gemq.quant.widths import TrellisWidth, Width, group_size_for
from record import RESULTS, append, environment

FILE = RESULTS / "trellis.csv"
OLMOE_WEIGHTS = 16 * 64 * 3 * 2048 * 1024
"""Expert weights of OLMoE-1B-7B."""

CHECKED_TILES = 4
DAMPENING = 0.01
SEQ_LEN = 512
GAINS = {1: 1.15, 1.25: 1.1, 1.5: 1.04, 1.75: 1.0, 2: 0.98, 2.5: 0.96, 3: 0.94, 3.5: 0.92, 4: 0.9}
"""Standard deviation relative to the table that unit Gaussians get before they are encoded, by bits."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-bits", nargs="+", type=int, default=[12, 14, 16])
    parser.add_argument("--bits", nargs="+", type=float, default=[1, 1.5, 2, 2.5, 3])
    parser.add_argument("--tiles", type=int, default=16384 if DEVICE.type == "cuda" else 32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--codebooks", action="store_true")
    parser.add_argument("--matrices", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--csv", type=Path, default=FILE)
    args = parser.parse_args()
    if args.codebooks:
        compare_codebooks(args)
    elif args.matrices:
        time_matrices(args)
    elif args.model:
        if args.text is None:
            sys.exit("trellis.py: --model needs --text")
        compare_with_gptq(args)
    else:
        measure_tiles(args)


def search() -> trellis.Viterbi:
    """The kernels on a GPU, else the reference."""
    if DEVICE.type == "cpu":
        return trellis.viterbi
    from gemq.quant import trellis_kernel

    return trellis_kernel.viterbi


def gaussians(tiles: int) -> Tensor:
    """Tiles [T, 256] of mean square one."""
    x = torch.randn(tiles, trellis.TILE_WEIGHTS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return x / x.square().mean().sqrt()


def gain(bits: float) -> float:
    """The gain of the nearest width of ``GAINS``."""
    return GAINS[min(GAINS, key=lambda known_bits: abs(known_bits - bits))]


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def squared_error(x: Tensor, bits: float, table: Tensor) -> float:
    """Mean squared error of unit Gaussians ``x`` [T, 256]."""
    eighths = TrellisWidth.read(bits).eighths
    words = trellis.encode(x * gain(bits), eighths, table, search())
    return (trellis.decode(words, eighths, table) / gain(bits) - x).square().mean().item()


# Tiles


def check(x: Tensor, eighths: int, table: Tensor) -> float:
    """Compare the kernels with the reference. Returns the share of equal states."""
    x = x[:CHECKED_TILES]
    overlap = torch.arange(CHECKED_TILES, device=DEVICE)
    equal = []
    for constraint in (None, overlap):
        states, totals = search()(x, eighths, table, constraint)
        expected, expected_totals = trellis.viterbi(x, eighths, table, constraint)
        torch.testing.assert_close(totals, expected_totals, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((x - table[states.long()]).square().sum(1), totals, rtol=1e-4, atol=1e-4)
        equal.append((states == expected).float().mean().item())
    return min(equal)


def measure_tiles(args: argparse.Namespace) -> None:
    x = gaussians(args.tiles)
    print("L  | bits  | error  | over 4^-b | equal states | ns a weight | OLMoE's experts, s")
    for state_bits in args.state_bits:
        table = trellis.byte_sum_table(state_bits).to(DEVICE)
        total = 0.0
        for bits in args.bits:
            eighths = TrellisWidth.read(bits).eighths
            equal = check(x, eighths, table)
            error = squared_error(x, bits, table)
            encode = lambda eighths=eighths, table=table: trellis.encode(x, eighths, table, search())
            per_weight = seconds(encode, args.repeats) / x.numel()
            total += per_weight * OLMOE_WEIGHTS
            print(
                f"{state_bits} | {bits:5} | {error:.4f} | {error * 4**bits:.3f} | {equal:.3f} | {per_weight * 1e9:.3f}"
                f" | {per_weight * OLMOE_WEIGHTS:.1f}",
                flush=True,
            )
            row = {"state_bits": state_bits, "bits": bits, "tiles": len(x), "error": error, "equal_states": equal}
            append(args.csv, row | {"ns_per_weight": per_weight * 1e9} | environment())
        print(f"{state_bits} | all these widths of OLMoE's experts: {total:.1f} s", flush=True)


# Codebooks


def half_sum_table(state_bits: int, multiplier: int, summand: int) -> Tensor:
    """Sums of two halves made from the bits of state * multiplier + summand (QTIP's 3INST, section 3.1.1)."""
    mixed = torch.arange(1 << state_bits) * multiplier + summand & 0xFFFFFFFF
    mixed = (mixed & 0x8FFF8FFF) ^ 0x3B603B60
    halves = torch.stack([mixed & 0xFFFF, mixed >> 16]).to(torch.uint16).view(torch.float16)
    return halves.float().sum(0)


def multiplier_table(state_bits: int, multiplier: int) -> Tensor:
    """``trellis.byte_sum_table`` with another multiplier."""
    product = torch.arange(1 << state_bits) * multiplier & 0xFFFFFFFF
    return torch.stack([(product >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0).float()


def gaussian_table(state_bits: int) -> Tensor:
    """Gaussian quantiles in random order."""
    size = 1 << state_bits
    quantiles = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size).float()
    return quantiles[torch.randperm(size, generator=torch.Generator().manual_seed(1))]


CODEBOOKS: dict[str, Callable[[int], Tensor]] = {
    "byte sum": trellis.byte_sum_table,
    "byte sum, 0x83DCD12D": lambda state_bits: multiplier_table(state_bits, 0x83DCD12D),
    "half sum, 89226354": lambda state_bits: half_sum_table(state_bits, 89226354, 64248484),
    "half sum, 0xCBAC1FED": lambda state_bits: half_sum_table(state_bits, 0xCBAC1FED, 0),
    "Gaussian table": gaussian_table,
}


def compare_codebooks(args: argparse.Namespace) -> None:
    x = gaussians(args.tiles)
    for state_bits in args.state_bits:
        for name, make_table in CODEBOOKS.items():
            table = make_table(state_bits)
            table = ((table - table.mean()) / table.std()).to(DEVICE)
            errors = [f"{squared_error(x, bits, table):.4f}" for bits in args.bits]
            print(f"{state_bits} | {name} | {' | '.join(errors)}", flush=True)


# Matrices


def time_matrices(args: argparse.Namespace) -> None:
    """Time ``quantize_ldlq`` for the gate and up matrices of a layer of OLMoE-1B-7B."""
    experts, rows, columns = 64 if DEVICE.type == "cuda" else 1, 2048, 2048 if DEVICE.type == "cuda" else 64
    weight = torch.randn(experts, rows, columns, device=DEVICE)
    upper = torch.eye(columns, device=DEVICE).expand(experts, -1, -1)
    for state_bits in args.state_bits:
        table = trellis.byte_sum_table(state_bits).to(DEVICE)
        for bits in args.bits:
            eighths = TrellisWidth.read(bits).eighths
            quantize = lambda eighths=eighths, table=table: trellis_feedback.quantize_ldlq(
                weight, upper, eighths, table, search()
            )
            per_weight = seconds(quantize, 1) / weight.numel()
            print(
                f"{state_bits} | {bits} | {per_weight * 1e9:.3f} ns a weight | {per_weight * OLMOE_WEIGHTS:.1f} s",
                flush=True,
            )


# A real layer


def expert_inputs(args: argparse.Namespace) -> tuple[Any, Tensor, Tensor]:
    """The experts module of a layer, its inputs [P, C], and the experts [P, top-k] that the router chose."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to(DEVICE)
    text = args.text.read_text(encoding="utf-8")[: args.windows * SEQ_LEN * 8]
    tokens = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
    tokens = tokens[: len(tokens) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)[: args.windows].to(DEVICE)
    experts = model.model.layers[args.layer].mlp.experts
    calls: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda _, inputs: calls.append((inputs[0], inputs[1])))
    with torch.no_grad():
        for batch in tokens.split(8):
            model(batch)
    return experts, torch.cat([x for x, _ in calls]), torch.cat([index for _, index in calls])


def layer_problems(args: argparse.Namespace) -> list[tuple[str, Tensor, Tensor]]:
    """Name, weights [E, R, C] and Hessians [E, C, C] of the first experts' matrices."""
    experts, x, index = expert_inputs(args)
    hessians: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    with torch.no_grad():
        for expert in range(args.experts):
            rows = x[(index == expert).any(1)]
            gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
            activation = experts.act_fn(gate) * up
            hessians["gate_up_proj"].append(rows.T @ rows / len(rows))
            hessians["down_proj"].append(activation.T @ activation / len(rows))
    weights = {name: getattr(experts, name).detach()[: args.experts] for name in hessians}
    return [(name, weights[name], torch.stack(hessians[name])) for name in hessians]


def weighted_error(weight: Tensor, result: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of D = weight - result, relative to that of D = weight: [E]."""
    cost = lambda d: ((d @ hessian.double()) * d).sum((1, 2))
    return cost(weight.double() - result.double()) / cost(weight.double())


def compare_with_gptq(args: argparse.Namespace) -> None:
    print("matrix | bits | GPTQ, groups of 128 | trellis | ratio")
    for name, weight, hessian in layer_problems(args):
        problem = rotated_problem(weight, hessian, DAMPENING)
        for bits in args.bits:
            scalar = scalar_error(weight, hessian, bits)
            error = weighted_error(weight, quantize(problem, TrellisWidth.read(bits)).dequantize(), hessian)
            print(
                f"{name} | {bits} | {scalar.mean().item():.5f} | {error.mean().item():.5f}"
                f" | {(error / scalar).mean().item():.3f}",
                flush=True,
            )


def scalar_error(weight: Tensor, hessian: Tensor, bits: float) -> Tensor:
    """The weighted error of GPTQ [E], not a number where no scalar width has these bits."""
    if bits not in (1, 2, 3, 4):
        return torch.full((len(weight),), float("nan"), device=weight.device)
    group_size = group_size_for(weight.shape[2], 128)
    quantized = gptq(weight, factorize(hessian, DAMPENING).upper, (Width(int(bits)),), group_size)
    return weighted_error(weight, dequantize(Quantized(*(tensor[0] for tensor in quantized))), hessian)


if __name__ == "__main__":
    main()
