"""Compile Triton kernels as they would be launched, for GPUs that are absent, and print a JSON line for each.

    python tests/unit/compile_kernels.py [--strength 2] [--jobs 2] [--only decode grouped training]

A launch is described by a few axes (architecture, dtype, tile, widths, group size ...). All combinations would take a
day, so the chosen launches cover every pair of values of two axes (``--strength 3``: every triple of three). The script
needs its own process, because Triton runs in interpreter mode in the test process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime.jit import JITFunction

from gemq.kernels import fetch
from gemq.kernels.activation import CLAMP_BEFORE, GELU_TANH, RELU_SQUARED, SILU, Activation
from gemq.kernels.decode import (
    attention,
    bit_fields,
    cache_write,
    choice,
    launch,
    norms,
    packed_arguments,
    router,
    tuning,
)
from gemq.kernels.grouped import dequantize, matmul, routing, unpack
from gemq.kernels.training import expert_ops, rotary
from gemq.kernels.trellis import dense_kernel, rotation
from gemq.kernels.trellis import launch as trellis_launch
from gemq.kernels.trellis import matmul as trellis_matmul
from gemq.quant import gptq_kernel, gram_kernel, grid_kernel, step_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHITECTURES = (80, 89, 90)
ACTIVATIONS = {
    "silu": Activation(SILU, gated=True),
    "clamped": Activation(SILU, True, True, CLAMP_BEFORE, 7.0, 1.7, 1.0),  # gpt-oss: interleaved, too
    "gelu": Activation(GELU_TANH, gated=True),
    "plain": Activation(RELU_SQUARED, gated=False),
}
LOW = (2, 3, 4, 8)
"""Levels of the widths that experts usually have."""

Axes = Mapping[str, Sequence[Any]]


class Device:
    """The part of a Triton driver that compilation needs."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Task:
    """One kernel with its constants, and the launch that it belongs to."""

    def __init__(self, fn: Any, signature: Any, constants: Any, attributes: Any, options: Any, target: GPUTarget):
        self.source = compiler.ASTSource(fn, signature, constants, attributes)
        self.name, self.options, self.target = fn.fn.__name__, options, target
        self.has_fixed_layout = fn.fn.__module__.startswith("gemq.kernels.decode.")
        self.launch: dict[str, str] = {}

    def compile(self) -> dict[str, Any]:
        """Compile down to LLVM IR. Triton's own passes and the shared memory use are then complete."""
        backend = compiler.make_backend(self.target)
        options = backend.parse_options({**vars(self.options), **self.source.parse_options()})
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, self.source.language)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        metadata: dict[str, Any] = {"target": self.target, **vars(options)}
        codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = self.source.make_ir(self.target, options, codegen, modules, context)
        result = {"kernel": self.name, "arch": self.target.arch, **self.launch}
        try:
            for stage in ("ttir", "ttgir", "llir"):
                module = stages[stage](module, metadata)
                if stage == "ttgir" and self.has_fixed_layout:
                    launch.check_vector_layout(SimpleNamespace(hash=object(), asm={"ttgir": str(module)}))
                if stage == "ttgir":
                    trellis_launch.check_fragment_layout(SimpleNamespace(hash=object(), asm={"ttgir": str(module)}))
        except Exception as error:  # noqa: BLE001 - any error of Triton is a finding
            return {**result, "error": f"{type(error).__name__}: {error}"[:300]}
        return {**result, "shared": metadata["shared"]}


TASKS: dict[str, Task] = {}
"""Tasks by everything that Triton's own cache distinguishes."""


def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Replacement of ``JITFunction.run`` that records the kernel instead of compiling it."""
    options |= {"debug": False, "instrumentation_mode": triton.knobs.compilation.instrumentation_mode}
    _, _, target, backend, binder = self.device_caches[triton.runtime.driver.active.get_current_device()]
    bound, specialization, parsed = binder(*args, **options)
    key = f"{self.fn.__module__}.{self.fn.__name__} {target} {specialization} {parsed}"
    if key not in TASKS:
        packed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, parsed)
        TASKS[key] = Task(self, signature, constants, attributes, packed, target)


def covering(axes: Axes, strength: int = 2, candidates: int = 100) -> Iterator[dict[str, Any]]:
    """Yield rows, with a value for each axis, that cover all combinations of values of any ``strength`` axes.

    Greedy: of several random rows with a missing combination, the one with the most missing combinations is chosen. The
    result is the same at every call.
    """
    draw = random.Random(0)
    names = list(axes)
    chosen_axes = list(itertools.combinations(range(len(names)), strength))
    values = [range(len(axes[name])) for name in names]
    missing = {(which, row) for which in chosen_axes for row in itertools.product(*(values[i] for i in which))}
    while missing:
        which, fixed = min(missing)
        best: list[int] = []
        covered: set[Any] = set()
        for _ in range(candidates):
            row = [draw.choice(value) for value in values]
            for axis, value in zip(which, fixed, strict=True):
                row[axis] = value
            hits = {(w, tuple(row[i] for i in w)) for w in chosen_axes} & missing
            if len(hits) > len(covered):
                best, covered = row, hits
        missing -= covered
        yield {name: axes[name][index] for name, index in zip(names, best, strict=True)}


def each_value(axes: Axes) -> Iterator[dict[str, Any]]:
    """Yield rows that have every value of every axis, in little time.

    Architectures take turns. Of the other axes, all rows without a new value have the first value, which has to be one
    that compiles quickly. Rows then repeat kernels that an axis does not affect, and a kernel is compiled once.
    """
    for i in range(max(map(len, axes.values()))):
        yield {
            name: values[i % len(values)] if name == "arch" else values[i] if i < len(values) else values[0]
            for name, values in axes.items()
        }


# Launches. Only the pointers of tensors matter, so a few elements suffice.


def empty_bytes() -> torch.Tensor:
    """Return a small buffer of codes, scales or offsets."""
    return torch.empty(64, dtype=torch.uint8)


def tiles(config_for: Callable[[int, int, torch.dtype], Any]) -> list[tuple[Any, bool]]:
    """Return the tiles that ``config_for`` chooses, and whether a tile is one of float32.

    Both types of 16 bits have the same tiles.
    """
    chosen = [{config_for(count, 1, dtype) for count in range(1, 1000)} for dtype in (BF16, FP16, FP32)]
    assert chosen[0] == chosen[1]
    return [*((config, False) for config in sorted(chosen[0])), *((config, True) for config in sorted(chosen[2]))]


FAILED_ONCE = {
    "arch": 90,
    "tile": (matmul.TileConfig(128, 64, 128, 4, 2), False),
    "dtype": BF16,
    "widths": unpack.levels_mask(LOW),
    "group": 128,
    "groups": 1,
    "product": "silu",
    "bias": False,
    "index": torch.int32,
}
"""A launch of ``grouped`` in vLLM that Triton 3.6 failed to compile while the number of groups was a constant."""

GROUPED: Axes = {
    "arch": ARCHITECTURES,
    "tile": tiles(matmul.config_for),
    "dtype": [BF16, FP16],
    "widths": [unpack.levels_mask(LOW), unpack.levels_mask([256])],
    "group": [128, 256, 64, 32, 16],
    "groups": [1, 2],
    "product": [*ACTIVATIONS, "down"],
    "bias": [False, True],
    "index": [torch.int32, torch.int64],
}


def grouped(
    tile: Any, dtype: torch.dtype, widths: int, group: int, groups: int, product: str, bias: bool, index: torch.dtype
) -> None:
    """Launch the grouped products and the sum over experts."""
    config, in_float32 = tile
    dtype = FP32 if in_float32 else dtype
    columns, rows, experts, top_k = groups * group, 512, 8, 4
    table = torch.empty(experts, 3, dtype=torch.int64)
    biases = torch.empty(experts, rows, dtype=dtype) if bias else None
    w = dequantize.PackedWeights(empty_bytes(), empty_bytes(), empty_bytes(), table, biases, widths, rows, group)
    order = routing.sort_pairs(torch.empty(64, top_k, dtype=index), experts, config.block_m)
    x = torch.empty(64, columns, dtype=dtype)
    if product == "down":
        matmul.matmul(x.expand(64, -1), w, config, order, scatter=True)
    else:
        matmul.matmul(x, w, config, order, top_k=top_k, activation=ACTIVATIONS[product])
    weights = torch.empty(64, top_k)
    routing.combine(torch.empty(256, columns, dtype=dtype), torch.empty(64, top_k, dtype=index), weights, experts)


LINEAR: Axes = {
    "arch": ARCHITECTURES,
    "tile": tiles(matmul.config_for),
    "dtype": [BF16, FP16],
    "levels": unpack.ALL_LEVELS,
    "group": [128, 64, 32, 16],
    "groups": [1, 2],
    "bias": [False, True],
}


def grouped_linear(tile: Any, dtype: torch.dtype, levels: int, group: int, groups: int, bias: bool) -> None:
    """Launch the grouped product and the dequantization of a single matrix."""
    config, in_float32 = tile
    dtype = FP32 if in_float32 else dtype
    rows = 512
    biases = torch.empty(rows, dtype=dtype) if bias else None
    w = dequantize.PackedWeights(
        empty_bytes(), empty_bytes(), empty_bytes(), None, biases, unpack.width_bit(levels), rows, group
    )
    columns = groups * group
    matmul.matmul(torch.empty(64, columns, dtype=dtype), w, config, None)
    dequantize.dequantize(w, columns, dtype)


DECODE: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "tokens": [(1, 8, 64), (4, 2, 8), (9, 4, 8), (16, 8, 64)],  # tokens, slots, experts
    "widths": [*((levels,) for levels in unpack.ALL_LEVELS), LOW, unpack.ALL_LEVELS],
    "size": [(16, 128), (1, 128), (2, 128), (112, 128), (9, 64), (1, 64), (4, 32), (1, 16), (16, 16)],  # groups, size
    "product": list(ACTIVATIONS),
    "bias": [False, True],
}


def decode(dtype: torch.dtype, tokens: Any, widths: Sequence[int], size: Any, product: str, bias: bool) -> None:
    """Launch the decode kernels of experts."""
    count, slots, experts = tokens
    groups, group = size
    columns, rows = groups * group, 512
    levels = tuning.widths_for(widths, group)
    table, index = torch.empty(experts, 3, dtype=torch.int64), torch.empty(count, slots, dtype=torch.int64)
    biases = torch.empty(experts, rows, dtype=dtype) if bias else None
    matrices = packed_arguments.PackedArguments(
        empty_bytes(), empty_bytes(), empty_bytes(), table, biases, rows, group, levels
    )
    launch.launch_up(torch.empty(count, columns, dtype=dtype), index, matrices, ACTIVATIONS[product])
    weights = torch.empty(count, slots, dtype=dtype) if product != "plain" else None
    launch.launch_down(torch.empty(count, slots, columns, dtype=dtype), index, weights, matrices)


TRELLIS_DECODE: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP32],
    "tokens": [(1, 8, 64), (4, 2, 8), (16, 8, 64)],  # tokens, slots, experts
    "columns": [2048, 14336, 48],
    "state_bits": [12, 8, 16],
    "product": ["silu", "clamped", "plain", "gelu"],
    "bias": [False, True],
}


def trellis_decode(dtype: torch.dtype, tokens: Any, columns: int, state_bits: int, product: str, bias: bool) -> None:
    """Launch the decode kernels of experts with trellis codes."""
    count, slots, experts = tokens
    rows = 512
    table, index = torch.empty(experts, 2, dtype=torch.int32), torch.empty(count, slots, dtype=torch.int64)
    biases = torch.empty(experts, rows, dtype=dtype) if bias else None
    w = trellis_launch.TrellisArguments(empty_bytes(), empty_bytes(), table, biases, rows, columns, state_bits)
    activation = ACTIVATIONS[product]
    y = torch.empty(count * slots, 1, 2 * columns if activation.gated else columns)
    order = trellis_launch.Slots.empty(index, experts)
    trellis_launch.launch_rotation(torch.empty(count, 1, columns, dtype=dtype), columns, dtype, slots=order)
    rotated = trellis_launch.launch_rotation(y, columns, dtype, activation)
    weights = torch.empty(count, slots, dtype=dtype) if product != "plain" else None
    trellis_launch.launch_rows(rotated, order, weights, w, are_slots_ready=bias)


DECODE_LINEARS: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "tokens": [1, 4, 16],
    "levels": unpack.ALL_LEVELS,
    "size": [(16, 128), (1, 128), (2, 128), (112, 128), (9, 64), (1, 64), (4, 32), (1, 16)],
    "count": [1, 3],
    "rows": [64, 4096],
    "bias": [False, True],
}


def decode_linears(dtype: torch.dtype, tokens: int, levels: int, size: Any, count: int, rows: int, bias: bool) -> None:
    """Launch the decode kernels of one or three linears."""
    groups, group = size
    tensors = [torch.empty(rows, 1, dtype=torch.uint8)] * count
    biases = [torch.empty(rows, dtype=dtype)] * count if bias else []
    x = torch.empty(tokens, groups * group, dtype=dtype)
    launch.launch_linears(x, packed_arguments.FusedLinears(tensors, tensors, tensors, biases, levels, group))


ATTENTION: Axes = {
    "write": ["", "plain", "rotated"],
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "length": [64, 4096],
    "head": [64, 80, 128, 256],
    "heads": [(8, 2), (32, 8)],
}


def decode_attention(dtype: torch.dtype, length: int, head: int, heads: Any, write: str) -> None:
    """Launch the attention of a decode step, and the write of prompts into its cache."""
    queries, groups = heads
    cache = torch.empty(1, groups, length, head, dtype=dtype)
    prompts = torch.empty(1, length, groups, head, dtype=dtype).transpose(1, 2)
    cache_write.write_prompts(prompts, prompts, cache, cache)
    query, bounds = torch.empty(1, queries, head, dtype=dtype), torch.empty(2, dtype=torch.int32)
    if not write:
        attention.decode_attention(query, cache, cache, bounds, 1.0)
        return
    key, angle = cache[:, :, 0], torch.empty(1, head, dtype=dtype)
    angles = (angle, angle) if write == "rotated" else (None, None)
    attention.attend_and_write(query, cache, cache, attention.NewToken(key, key, *angles), bounds, 1.0)


STEP: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "hidden": [2048, 2880, 7168],
    "terms": [0, 8],
    "residual": [False, True],
    "norm": [None, False, True],
    "experts": [(64, 8), (384, 6)],
    "normalized": [False, True],
}


def step(
    dtype: torch.dtype,
    hidden: int,
    terms: int,
    residual: bool,
    norm: bool | None,
    experts: Any,
    normalized: bool,
) -> None:
    """Launch norms, a router and the choice of a token of a decode step."""
    count, top_k = experts
    x = torch.empty(1, 1, hidden, dtype=dtype)
    weight = None if norm is None else norms.NormWeight(torch.empty(hidden, dtype=dtype), 1e-6, norm)
    if weight is not None:
        norms.rms_norm(x, weight)
        heads = norms.NormWeight(torch.empty(64, dtype=dtype), 1e-6, weight.rounds_twice)
        norms.rms_norm(x.view(1, 1, -1, 64), heads)
        norms.two_norms(x[0], norms.SliceNorm(0, 512, heads), norms.SliceNorm(1024, 256, heads))
    if residual or weight is not None:
        summed = torch.empty(1, terms, hidden) if terms else x
        norms.add(summed, x if residual else None, weight, terms)
    position = torch.empty(1, dtype=torch.int64)
    choice.advance(torch.empty(1, 50304, dtype=dtype), position, position)
    router.route(x, torch.empty(count, hidden, dtype=dtype), top_k, normalized, dtype)


FETCH: Axes = {"arch": ARCHITECTURES, "tokens": [1, 16, 1024], "index": [torch.int32, torch.int64]}


def fetch_experts(tokens: int, index: torch.dtype) -> None:
    """Launch the copy of chosen experts from host memory."""
    chosen = torch.empty(tokens, 4, dtype=index)
    table = torch.empty(32, 2, 3, dtype=torch.int64)
    fetch._launch(chosen, torch.empty_like(chosen), table, empty_bytes(), range(2))


TRELLIS_GROUPED: Axes = {
    "arch": ARCHITECTURES,
    "tile": tiles(trellis_matmul.config_for),
    "dtype": [BF16, FP16],
    "columns": [2048, 80],
    "product": [*ACTIVATIONS, "down"],
    "state_bits": [12, 16],
    "bias": [False, True],
    "index": [torch.int32, torch.int64],
}


def trellis_grouped(
    tile: Any, dtype: torch.dtype, columns: int, product: str, state_bits: int, bias: bool, index: torch.dtype
) -> None:
    """Launch the grouped products of trellis experts."""
    config, in_float32 = tile
    dtype = FP32 if in_float32 else dtype
    rows, experts, top_k = 512, 8, 4
    table, scales = torch.empty(experts, 2, dtype=torch.int32), torch.empty(experts, rows, dtype=torch.uint8)
    biases = torch.empty(experts, rows, dtype=dtype) if bias else None
    w = trellis_launch.TrellisArguments(empty_bytes(), scales, table, biases, rows, columns, state_bits)
    order = routing.sort_pairs(torch.empty(64, top_k, dtype=index), experts, config.block_m)
    x = rotation.rotate_operand(torch.empty(64, columns, dtype=dtype), trellis_matmul.padded_columns(columns, config))
    if product == "down":
        trellis_matmul.matmul(x, w, config, order, scatter=True)
    else:
        trellis_matmul.matmul(x, w, config, order, top_k=top_k, activation=ACTIVATIONS[product])


TRELLIS_DENSE: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "columns": [2048, 96, 80],
}


def trellis_dense(dtype: torch.dtype, columns: int) -> None:
    """Launch dense decoding and the gradients of scales."""
    rows, experts = 512, 8
    table, scales = torch.empty(experts, 2, dtype=torch.int32), torch.empty(experts, rows)
    dense_kernel.dense(empty_bytes(), table, scales, rows, columns, 12, dtype)
    gradient = torch.empty(experts, rows, columns, dtype=dtype)
    dense_kernel.scale_gradients(gradient, empty_bytes(), table, 12)


TRAINING: Axes = {
    "arch": ARCHITECTURES,
    "dtype": [BF16, FP16, FP32],
    "hidden": [96, 2048],
    "group": [16, 64, 128],
}


def training(dtype: torch.dtype, hidden: int, group: int) -> None:
    """Launch the kernels of training, GPTQ and scoring."""
    rows, top_k, experts = 32, 2, 4
    x, y = torch.empty(rows, hidden, dtype=dtype), torch.empty(rows * top_k, hidden, dtype=dtype)
    token = torch.zeros(rows * top_k, dtype=torch.int64)
    positions = torch.zeros(rows, top_k, dtype=torch.int64)
    weights = torch.empty(rows * top_k, dtype=dtype)
    y.requires_grad_()
    weights.requires_grad_()
    expert_ops.combine(y, weights, token, positions).backward(x)
    gathered = expert_ops.gather(x.clone().requires_grad_(), token, positions)
    gathered.backward(torch.empty_like(gathered))
    gate = torch.empty(rows, 2 * hidden, dtype=dtype, requires_grad=True)
    expert_ops.silu_gate(gate).backward(x)
    expert_ops.residual_gradient(x, x, torch.empty(rows), torch.empty(()))
    for squares in (False, True):
        expert_ops.projection(x, x, x, squares)
    turn = torch.empty(1, rows, 64, dtype=dtype)
    rotary.rotary(torch.empty(1, 4, rows, 64, dtype=dtype, requires_grad=True), turn, turn).backward(
        torch.empty(1, 4, rows, 64, dtype=dtype)
    )
    if dtype != FP32:
        sums, ends = torch.empty(experts, hidden, hidden), torch.empty(experts, dtype=torch.int64)
        gram_kernel.add(sums, x, ends)
        gram_kernel.add_products(sums, x, x, ends)
    columns, widths = 2 * group, 3
    upper, highest = torch.empty(experts, columns, columns), torch.empty(widths, experts)
    for soft_codes in (None, torch.empty(widths, experts, rows, columns, dtype=torch.int16)):
        gptq_kernel.quantize(torch.empty(experts, rows, columns, dtype=dtype), upper, highest, group, soft_codes)
    codes, table = empty_bytes(), torch.empty(experts, 3, dtype=torch.int64)
    dequantize.grid_gradients(torch.empty(experts, rows, columns, dtype=dtype), codes, table, 63, group)
    scales = torch.empty(experts, rows, 2)
    grid_kernel.changed(scales, scales, scales, scales, torch.empty(experts, 1, 1))
    trained = dequantize.PackedWeights(codes, scales, scales, table, None, 63, rows, group)
    dequantize.dequantize(trained, columns, dtype)
    for soft_codes in (torch.float32, torch.int16):
        _training_step(dtype, torch.empty(experts, rows, columns, dtype=soft_codes), scales)


def _training_step(dtype: torch.dtype, soft_codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Launch the optimizer's step on codes and grids."""
    from gemq.quant.trainable_gpu import StepSchedule, TrainingState

    weight = torch.empty(soft_codes.shape, dtype=dtype)
    moments = (torch.empty(soft_codes.shape, dtype=BF16),) * 2
    state = TrainingState(weight, soft_codes, moments, (scales, scales), (scales, scales), (scales,) * 4)
    steps = StepSchedule(torch.empty(4, 3), torch.empty((), dtype=torch.int64))
    numbers = torch.empty(len(soft_codes), dtype=torch.int64)
    step_kernel.step(state, weight, torch.empty(len(soft_codes)), numbers, steps, True, 0)


KINDS: dict[str, list[tuple[Callable[..., None], Axes]]] = {
    "grouped": [(grouped, GROUPED), (grouped_linear, LINEAR)],
    "trellis_decode": [(trellis_decode, TRELLIS_DECODE)],
    "decode": [
        (decode, DECODE),
        (decode_linears, DECODE_LINEARS),
        (decode_attention, ATTENTION),
        (step, STEP),
        (fetch_experts, FETCH),
    ],
    "training": [(training, TRAINING)],
    "trellis_grouped": [(trellis_grouped, TRELLIS_GROUPED), (trellis_dense, TRELLIS_DENSE)],
}


def collect(kinds: Sequence[str], strength: int) -> list[Task]:
    """Return the kernels of all launches, each once."""
    JITFunction.run = record  # type: ignore[method-assign]
    precisions = {BF16: bit_fields.BF16, FP16: bit_fields.FP16, FP32: bit_fields.SPLIT}
    launch.operand = lambda x: int(precisions[x.dtype])  # as on a GPU
    launch.supports_pdl = lambda device: triton.runtime.driver.active.get_current_device() >= 90
    for function, axes in (pair for kind in kinds for pair in KINDS[kind]):
        rows = covering(axes, strength) if strength > 1 else each_value(axes)
        for row in (*rows, *([FAILED_ONCE] if function is grouped else [])):
            values = dict(row)
            triton.runtime.driver.set_active(Device(values.pop("arch")))
            count = len(TASKS)
            function(**values)
            for task in list(TASKS.values())[count:]:
                task.launch = {"launch": function.__name__, **{name: str(value) for name, value in values.items()}}
    return list(TASKS.values())


def compile_task(number: int) -> dict[str, Any]:
    """Compile a task in a worker process."""
    return list(TASKS.values())[number].compile()


def main() -> None:
    """Compile all kernels and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--strength", type=int, default=2, help="axes whose combinations of values all occur")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    tasks = collect(args.only, args.strength)
    failures = 0
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        chunk = max(1, math.ceil(len(tasks) / (args.jobs * 16)))
        for result in pool.imap_unordered(compile_task, range(len(tasks)), chunksize=chunk):
            failures += "error" in result
            print(json.dumps(result), flush=True)
    print(f"{len(tasks)} kernels, {failures} failures", file=sys.stderr)


if __name__ == "__main__":
    main()
