"""How fast a model runs: decode and prefill, load and first token, beside what the device's memory allows.

Times whole models through ``decoding.decoder``, as ``gemq generate`` runs them, with random tokens and without a
tokenizer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from gemq.decoding.decoder import FALLBACKS, Decoder, Unsupported
from gemq.errors import UserError
from gemq.evaluation.evaluate import open_model
from gemq.evaluation.weight_traffic import bytes_per_step, copy_bandwidth, synchronize
from gemq.models.experts import use_fast_experts
from gemq.models.source import longest_window
from gemq.runtime.fallbacks import take_lines
from gemq.runtime.progress import Monitor

RUNS = 5
PROMPT = 128
"""Tokens of the prompts that decoding starts from."""


@dataclass(frozen=True)
class Work:
    """What is timed. ``compiled``: whether decoder layers are compiled (on a GPU)."""

    batches: Sequence[int]
    prefills: Sequence[int]
    new_tokens: int
    compiled: bool

    @classmethod
    def default(cls, device: torch.device) -> Work:
        """On a CPU less, since packed weights run slowly there."""
        if device.type == "cuda":
            return cls((1, 4, 16), (128, 512, 2048), 128, compiled=True)
        return cls((1,), (128,), 16, compiled=False)


def bench_path(
    path: str,
    *,
    batches: Sequence[int] | None = None,
    prefills: Sequence[int] | None = None,
    new_tokens: int | None = None,
    compiled: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """``bench`` for a model on disk: what ``gemq bench`` prints as JSON. What is not given is ``Work.default``.

    Adds ``model``, ``stored_bytes`` and, in ``seconds``, ``load`` and ``first_token``: from the loaded model to the
    first token, with everything that a first call compiles.
    """
    if new_tokens is not None and new_tokens < 2:
        raise UserError(f"--new-tokens cannot be {new_tokens}: the least is 2")
    monitor = monitor or Monitor()
    start = time.perf_counter()
    with monitor.stage("load", 1) as tick:
        opened = open_model(path, dtype, device, trust_remote_code)
        model = opened.model
        if opened.contents is None:
            use_fast_experts(model)
        synchronize(model.device)
        tick()
    loaded = time.perf_counter() - start
    usual = Work.default(model.device)
    longest = longest_window(model.config)
    if prefills and max(prefills) > longest:
        raise UserError(f"--prefill {max(prefills)} is longer than the model takes: give at most {longest}")
    work = Work(
        batches or usual.batches,
        prefills or [n for n in usual.prefills if n <= longest] or [longest],
        new_tokens or usual.new_tokens,
        compiled and usual.compiled,
    )
    first = time_first_token(model)
    values = bench(model, work, monitor)
    seconds = {"load": loaded, "first_token": first}
    return {"model": str(Path(path)), "stored_bytes": opened.stored_bytes, "seconds": seconds, **values}


def bench(model: Any, work: Work, monitor: Monitor | None = None) -> dict[str, Any]:
    """Figures of a loaded model.

    ``decode``: a row for each batch: tokens a second of all sequences together (p20, p50, p80 over ``RUNS`` runs),
    bytes of weights read a step (``evaluation.weight_traffic``), bytes a second, their share of the copy bandwidth, how
    the step ran, seconds of compiling and capturing it. ``prefill``: a row for each length, batch 1.
    """
    monitor = monitor or Monitor()
    device = model.device
    with monitor.stage("bench", 1 + len(work.batches) + len(work.prefills)) as tick:
        bandwidth = copy_bandwidth(device)
        tick()
        decode: list[dict[str, Any]] = []
        notes: dict[str, str] = {}
        for batch in work.batches:
            row, left_out = time_decode(model, batch, work.new_tokens, work.compiled)
            if "bytes_per_step" in row:
                row["bytes_per_second"] = row["bytes_per_step"] * row["tokens_per_second"]["p50"] / batch
                row["share_of_copy"] = row["bytes_per_second"] / bandwidth
            decode.append(row)
            notes |= left_out
            tick()
        prefill = []
        for length in work.prefills:
            prefill.append(time_prefill(model, length))
            tick()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bytes_per_second": bandwidth,
        "new_tokens": work.new_tokens,
        "decode": decode,
        "prefill": prefill,
        "fallbacks": [*(f"{FALLBACKS[name]} ({reason})" for name, reason in notes.items()), *take_lines()],
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


@torch.no_grad()
def time_first_token(model: Any, length: int = PROMPT) -> float:
    """Seconds from a loaded model to its first token after ``length`` tokens, read by the host."""
    start = time.perf_counter()
    length = min(length, longest_window(model.config))
    ids = _random_ids(model, 1, length)
    try:
        Decoder(model, 1, length + 1).prefill(ids).tolist()
    except Unsupported:
        model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - start


def time_decode(model: Any, batch: int, count: int, compiled: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """One row of ``decode``, and what was not done as asked, with its reason."""
    prompt = min(PROMPT, max(1, longest_window(model.config) - count))
    ids = _random_ids(model, batch, prompt)
    try:
        decoder, moved = _prepared(model, batch, ids, prompt + count + 1, compiled)
    except Unsupported as why:
        rate = _rate(_generate_seconds(model, ids, count), batch * count)
        row = {"batch": batch, "tokens_per_second": rate, "execution": "model.generate", "seconds": {}}
        return row, {"decoded_by_transformers": str(why)}

    def run() -> float:
        decoder.prefill(ids)
        synchronize(model.device)
        start = time.perf_counter()
        for _ in decoder.decode(count):
            pass
        return time.perf_counter() - start

    run()
    row = {
        "batch": batch,
        "tokens_per_second": _rate([run() for _ in range(RUNS)], batch * count),
        "execution": decoder.execution,
        "bytes_per_step": moved,
        "seconds": decoder.seconds,
    }
    return row, decoder.reasons


def _prepared(model: Any, batch: int, ids: Tensor, length: int, compiled: bool) -> tuple[Decoder, float]:
    """A decoder that is ready to be timed, and the bytes of weights that its steps read."""
    decoder = Decoder(model, batch, length)
    decoder.prefill(ids)
    moved = bytes_per_step(decoder)
    decoder.prefill(ids)
    decoder.prepare(compile_layers=compiled)
    return decoder, moved


def _generate_seconds(model: Any, ids: Tensor, count: int) -> list[float]:
    """Seconds that ``model.generate`` takes for ``count`` tokens after the first one."""

    def run(tokens: int) -> float:
        synchronize(model.device)
        start = time.perf_counter()
        limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **limits)
        synchronize(model.device)
        return time.perf_counter() - start

    run(2)
    return [run(count + 1) - run(1) for _ in range(RUNS)]


def time_prefill(model: Any, length: int) -> dict[str, Any]:
    """One row of ``prefill``: a prompt of ``length`` tokens up to its first new token."""
    ids = _random_ids(model, 1, length)
    try:
        decoder = Decoder(model, 1, length + 1)
        decoder.prefill(ids)
        forward: Callable[[], Any] = lambda: decoder.prefill(ids)
    except Unsupported:
        forward = lambda: model(input_ids=ids)

    def run() -> float:
        synchronize(model.device)
        start = time.perf_counter()
        with torch.no_grad():
            forward()
        synchronize(model.device)
        return time.perf_counter() - start

    run()
    return {"tokens": length, "tokens_per_second": _rate([run() for _ in range(RUNS)], length)}


def _rate(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """Tokens a second: p20 is a slow run, p80 a fast one."""
    rates = sorted(tokens / s for s in seconds)
    p20, _, _, p80 = statistics.quantiles(rates, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(rates), "p80": p80}


def _random_ids(model: Any, batch: int, length: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=random).to(model.device)
