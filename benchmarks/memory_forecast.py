"""Is the memory that ``gemq plan --memory`` counts right? Counted bytes next to PyTorch's peak on a GPU.

    python benchmarks/memory_forecast.py [--shapes olmoe-1b-7b-2.0 mixtral-8x7b-2.0] [--compile]

Packed models of true shapes with random weights read a prompt and decode ``NEW_TOKENS`` tokens, as ``gemq generate``
does, at a quarter of the context and at the full one. Weights, cache and the peaks of prefill and decode are compared
with ``planning.serving_memory``. One row per shape and context in results/memory_forecast.csv. About a minute on an
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
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from gemq.decoding.decoder import Decoder
from gemq.models.structure import find_structure
from gemq.planning.serving_memory import CONTEXT_BYTES, ServingMemory
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from record import RESULTS, append, environment
from shapes import SHAPES, Shape, mean_bits, packed_model

NEW_TOKENS = 64
MAX_CONTEXT = 8192
"""Or what the shape supports. As long as one prompt that is counted as read at once."""


def forecast(shape: Shape) -> ServingMemory:
    """What ``gemq plan`` counts for a shape."""
    with init_empty_weights(include_buffers=False):
        skeleton = AutoModelForCausalLM.from_config(shape.dense_config(), dtype=torch.bfloat16)
    return ServingMemory(skeleton.eval(), find_structure(skeleton), Recipe(widths=tuple(Width)))


def allocated() -> int:
    """Bytes of live tensors on the GPU."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def peak(run: Callable[[], Any]) -> int:
    """PyTorch's peak while ``run`` runs, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(model: Any, context: int, compiled: bool) -> dict[str, int]:
    """Bytes of one sequence of ``context`` tokens: prompt, graph and ``NEW_TOKENS`` decoded tokens."""
    weights = allocated()
    decoder = Decoder(model, 1, context)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, context - NEW_TOKENS), device=model.device)
    peaks = {"prefill": peak(lambda: decoder.prefill(ids))}
    between = allocated()
    peaks["prepare"] = peak(lambda: decoder.prepare(compile_layers=compiled))
    peaks["decode"] = peak(lambda: list(decoder.decode(NEW_TOKENS - 1)))
    free, total = torch.cuda.mem_get_info()
    return {
        "weights": weights,
        "cache": between - weights,
        **{f"peak_{name}": value for name, value in peaks.items()},
        "peak": max(peaks.values()),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "outside_torch": total - free - torch.cuda.memory_reserved(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["olmoe-1b-7b-2.0", "mixtral-8x7b-2.0"])
    parser.add_argument("--compile", action="store_true", dest="compiled")
    parser.add_argument("--csv", type=Path, default=RESULTS / "memory_forecast.csv")
    args = parser.parse_args()
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
    """Prints counted and measured megabytes, and the share by which the count is off."""
    table = Table(title=f"{name}, {context} tokens, MB", title_justify="left")
    for column in ("", "counted", "measured", "counted too much"):
        table.add_column(column, justify="right")
    for row in dict.fromkeys([*expected, *measured]):
        cells = [f"{sizes[row] / 1e6:,.1f}" if row in sizes else "" for sizes in (expected, measured)]
        difference = expected[row] / measured[row] - 1 if row in expected and measured.get(row) else None
        table.add_row(row, *cells, "" if difference is None else f"{difference:+.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
