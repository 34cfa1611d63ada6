"""How fast does a model write its own windows? Prints and appends one CSV row a way of writing.

    python benchmarks/windows.py MODEL [--device cuda] [--dtype float32 bfloat16] [--seq-len 512] [--rows 0]

A batch of windows, as many as a job writes side by side unless ``--rows`` says otherwise: by steps over a static cache
(in a CUDA graph on a GPU) and by steps that call the model as it is. ``nats`` is the mean loss of the model on what it
wrote, which tells a fault of the loop: both ways sample from the same distribution.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from gemq.calibration.self_generation import SELF_SOURCE_OPENINGS, WindowPlan, batch_size, generate_windows
from gemq.evaluation.evaluate import open_model
from gemq.models.experts import use_experts_forward, use_fast_experts
from record import RESULTS, append, environment

FILE = RESULTS / "windows.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=["static", "growing"])
    parser.add_argument("--out", type=Path, default=FILE)
    a = parser.parse_args()
    for dtype in a.dtype:
        for rows in a.rows:
            for way in a.ways:
                measure(a.model, a.device, dtype, rows, a.seq_len, way == "static", a.out)


def measure(name: str, device: str, dtype: str, rows: int, seq_len: int, static: bool, out: Path) -> None:
    opened = open_model(name, dtype, device)
    model, tokenizer = opened.model, opened.tokenizer
    rows = rows or batch_size(model.config.get_text_config(), seq_len)
    use_fast_experts(model)
    write = lambda seq_len, seed: generate_windows(
        model, tokenizer, WindowPlan(rows, seed, SELF_SOURCE_OPENINGS), seq_len=seq_len, batch=rows, static=static
    )
    write(seq_len=4, seed=1)
    _wait(device)
    start = time.perf_counter()
    generated = write(seq_len=seq_len, seed=0)
    _wait(device)
    seconds = time.perf_counter() - start
    use_experts_forward(model)
    row = {
        "model": Path(name).name,
        "dtype": dtype,
        "way": "static" if static and not generated.eager_windows else "growing",
        "rows": rows,
        "seq_len": seq_len,
        "seconds": seconds,
        "ms_per_step": 1e3 * seconds / (seq_len - 1),
        "tokens_per_second": generated.tokens[0].numel() / seconds,
        "nats": _loss(model, generated.tokens[0][:64], device),
        **environment(device),
    }
    append(out, row)
    print({k: row[k] for k in list(row)[:9]}, flush=True)


@torch.no_grad()
def _loss(model: torch.nn.Module, tokens: torch.Tensor, device: str) -> float:
    losses = []
    for batch in tokens.to(device).split(8):
        logits = model(batch).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    return float(torch.stack(losses).mean())


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
