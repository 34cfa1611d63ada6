"""Is the memory that ``gemq plan --memory`` counts right? Counted bytes next to PyTorch's peak on a GPU.

    python benchmarks/memory_forecast.py [--shapes olmoe-1b-7b-2.0 mixtral-8x7b-trellis-2.5] [--compile]

Packed models of true shapes with random weights read a prompt and decode ``NEW_TOKENS`` tokens, as ``gemq generate``
does, at a quarter of the context and at the full one. Weights, cache and the peaks of prefill and decode are compared
with ``planning.serving_memory``. ``peak`` is that of tensors. ``total`` also has what PyTorch and CUDA hold beyond
them, as ``nvidia-smi`` shows it. One row per shape and context in results/memory_forecast.csv. About 90 seconds on an
H200. Without a GPU only the forecast is printed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from gemq.decoding.decoder import Decoder
from gemq.models.structure import find_structure
from gemq.planning.serving_memory import ServingMemory
from gemq.quant.widths import ALL_TRELLIS_WIDTHS, Width
from gemq.recipe import Recipe
from gemq.runtime.memory import CONTEXT_BYTES
from record import RESULTS, append, environment
from shapes import SHAPES, Shape, mean_bits, packed_model

NEW_TOKENS = 64
DEFAULT_SHAPES = ("olmoe-1b-7b-2.0", "olmoe-1b-7b-trellis-2.0", "mixtral-8x7b-2.0", "mixtral-8x7b-trellis-2.5")
MAX_CONTEXT = 8192
"""Or what the shape supports. As long as one prompt that is counted as read at once."""


def forecast(shape: Shape) -> ServingMemory:
    """What ``gemq plan`` counts for a shape."""
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(shape.dense_config(), dtype=torch.bfloat16)
    if shape.has_trellis:
        recipe = Recipe(codes="trellis", widths=ALL_TRELLIS_WIDTHS)
    else:
        recipe = Recipe(codes="affine", widths=tuple(Width))
    return ServingMemory(skeleton.eval(), find_structure(skeleton), recipe)


def allocated() -> int:
    """Bytes of live tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def peaks(run: Callable[[], Any]) -> dict[str, int]:
    """Peak bytes of PyTorch's tensors while ``run`` runs, and of the memory that it took from CUDA for them."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def measure(model: Any, context: int, compiled: bool) -> dict[str, int]:
    """Bytes of one sequence of ``context`` tokens: prompt, graph and ``NEW_TOKENS`` decoded tokens."""
    weights = allocated()
    decoder = Decoder(model, 1, context)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, context - NEW_TOKENS), device=model.device)
    phases = {"prefill": peaks(lambda: decoder.prefill(ids))}
    with_cache = allocated()
    phases["prepare"] = peaks(lambda: decoder.prepare(compile_layers=compiled))
    phases["decode"] = peaks(lambda: list(decoder.decode(NEW_TOKENS - 1)))
    free, total = torch.cuda.mem_get_info()
    outside_torch = total - free - torch.cuda.memory_reserved()
    peak_reserved = max(phase["reserved"] for phase in phases.values())
    return {
        "weights": weights,
        "cache": with_cache - weights,
        **{f"peak_{name}": phase["allocated"] for name, phase in phases.items()},
        "peak": max(phase["allocated"] for phase in phases.values()),
        "outside_torch": outside_torch,
        "total": peak_reserved + outside_torch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--csv", type=Path, default=RESULTS / "memory_forecast.csv")
    args = parser.parse_args()
    print(f"{'':<16}      counted      measured   counted / measured")
    for name in args.shapes:
        shape = SHAPES[name]
        counted = forecast(shape)
        bits = mean_bits(shape)
        longest = min(MAX_CONTEXT, counted.longest_context)
        model = packed_model(shape, "cuda") if torch.cuda.is_available() else None
        for context in (longest // 4, longest):
            expected = {
                "weights": counted.weight_bytes(bits),
                "cache": counted.cache_bytes(context, 1),
                "peak": counted.total_bytes(bits, context, 1) - CONTEXT_BYTES,
                "outside_torch": CONTEXT_BYTES,
                "total": counted.total_bytes(bits, context, 1),
            }
            measured = measure(model, context, args.compiled) if model is not None else {}
            show(name, context, expected, measured)
            if measured:
                row = {"shape": name, "context": context, "compiled": args.compiled}
                row |= {f"counted_{figure}": size for figure, size in expected.items()} | measured
                append(args.csv, {**row, **environment()})
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def show(name: str, context: int, expected: dict[str, int], measured: dict[str, int]) -> None:
    """Prints counted and measured megabytes, and the ratio of the two."""
    print(f"{name}, {context} tokens")
    for figure in dict.fromkeys([*expected, *measured]):
        cells = [f"{sizes[figure] / 1e6:>10,.1f} MB" if figure in sizes else 13 * " " for sizes in (expected, measured)]
        ratio = expected[figure] / measured[figure] if figure in expected and measured.get(figure) else None
        print(f"  {figure:<14}", *cells, "" if ratio is None else f"{ratio:8.3f}", flush=True)


if __name__ == "__main__":
    main()
