"""Speed of a model: decode, prefill, load and first token, compared with the memory bandwidth of the device.

Runs whole models through ``decoding.decoder``, as ``gemq generate`` does. The tokens are random, so that no tokenizer
is needed.
"""

from __future__ import annotations

import math
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
from gemq.models.source import max_seq_len
from gemq.runtime.device import pick_device
from gemq.runtime.fallbacks import pop_messages
from gemq.runtime.progress import Monitor

NUM_RUNS = 5
"""Timed runs of each measurement, after one that is not timed."""

PROMPT_TOKENS = 128
"""Length of the prompts that decoding starts from."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured.

    Attributes:
        batches: batch sizes of decoding
        prefills: prompt lengths of prefill
        new_tokens: tokens decoded in each run
        compiled: whether decoder layers are compiled in place of fused kernels
    """

    batches: Sequence[int]
    prefills: Sequence[int]
    new_tokens: int
    compiled: bool

    @classmethod
    def default(cls, device: torch.device) -> BenchConfig:
        """Returns the defaults of ``gemq bench``: fewer measurements on a CPU, where packed weights are slow."""
        if device.type == "cuda":
            return cls((1, 4, 16), (128, 512, 2048), 128, compiled=False)
        return cls((1,), (128,), 16, compiled=False)

    def largest_texts(self) -> tuple[int, int]:
        """Returns the batch size and the tokens of each text, prompt and answer, that take the largest cache."""
        decoded = (max(self.batches, default=1), PROMPT_TOKENS + self.new_tokens + 1)
        return max(decoded, (1, max(self.prefills, default=0) + 1), key=math.prod)


def bench_path(
    path: str,
    *,
    batches: Sequence[int] | None = None,
    prefills: Sequence[int] | None = None,
    new_tokens: int | None = None,
    compiled: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Measures the speed of a model on disk.

    See ``BenchConfig`` for what is measured and its defaults, and ``open_model`` for the other arguments.

    Returns:
        What ``gemq bench`` prints as JSON: the values of ``bench``, ``model``, ``stored_bytes``, and ``seconds`` of
        ``load`` and of ``first_token``. The latter is the time from the loaded model to its first token, including
        everything that a first call compiles.
    """
    if new_tokens is not None and new_tokens < 2:
        raise UserError(f"--new-tokens cannot be {new_tokens}: the minimum is 2")
    monitor = monitor or Monitor()
    defaults = BenchConfig.default(pick_device(device))
    batches, new_tokens = batches or defaults.batches, new_tokens or defaults.new_tokens
    planned = BenchConfig(batches, prefills or defaults.prefills, new_tokens, compiled)
    batch, context = planned.largest_texts()
    start = time.perf_counter()
    with monitor.stage("load", 1) as tick:
        loaded = open_model(path, dtype, device, trust_remote_code, gpu_memory, context, batch)
        model = loaded.model
        if loaded.contents is None:
            use_fast_experts(model)
        synchronize(model.device)
        tick()
    load_seconds = time.perf_counter() - start
    longest = max_seq_len(model.config)
    if prefills and max(prefills) > longest:
        raise UserError(f"--prefill {max(prefills)} is longer than the model takes: give at most {longest}")
    default_prefills = [length for length in defaults.prefills if length <= longest] or [longest]
    config = BenchConfig(batches, prefills or default_prefills, new_tokens, compiled and model.device.type == "cuda")
    first_token_seconds = time_first_token(model)
    values = bench(model, config, monitor)
    return {
        "model": str(Path(path)),
        "stored_bytes": loaded.stored_bytes,
        "seconds": {"load": load_seconds, "first_token": first_token_seconds},
        **values,
    }


def bench(model: Any, config: BenchConfig, monitor: Monitor | None = None) -> dict[str, Any]:
    """Measures the speed of a loaded model.

    Args:
        config: what to measure

    Returns:
        Properties of the machine and two lists of rows. A row of ``decode`` belongs to a batch size. It has tokens per
        second of all sequences (p20, p50, p80 over ``NUM_RUNS`` runs), bytes of weights read per step
        (``evaluation.weight_traffic``) and per second, the latter's share of the copy bandwidth, how the step was
        executed, and seconds of compiling and capturing it. A row of ``prefill`` belongs to a prompt length.
    """
    monitor = monitor or Monitor()
    device = model.device
    with monitor.stage("bench", 1 + len(config.batches) + len(config.prefills)) as tick:
        bandwidth = copy_bandwidth(device)
        tick()
        decode: list[dict[str, Any]] = []
        reasons: dict[str, str] = {}
        for batch in config.batches:
            row, row_reasons = time_decode(model, batch, config.new_tokens, config.compiled)
            if "bytes_per_step" in row:
                steps_per_second = row["tokens_per_second"]["p50"] / batch
                row["bytes_per_second"] = row["bytes_per_step"] * steps_per_second
                row["share_of_copy"] = row["bytes_per_second"] / bandwidth
            decode.append(row)
            reasons |= row_reasons
            tick()
        prefill = []
        for length in config.prefills:
            row, row_reasons = time_prefill(model, length)
            prefill.append(row)
            reasons |= row_reasons
            tick()
    fallbacks = [f"{FALLBACKS[name]} ({reason})" for name, reason in reasons.items()]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bytes_per_second": bandwidth,
        "new_tokens": config.new_tokens,
        "decode": decode,
        "prefill": prefill,
        "fallbacks": fallbacks + pop_messages(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


@torch.no_grad()
def time_first_token(model: Any) -> float:
    """Returns the seconds from a loaded model to the first token after a prompt, read by the host."""
    start = time.perf_counter()
    length = min(PROMPT_TOKENS, max_seq_len(model.config))
    ids = _random_ids(model, 1, length)
    try:
        Decoder(model, 1, length + 1).prefill(ids).tolist()
    except Unsupported:
        model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - start


def time_decode(model: Any, batch: int, new_tokens: int, compiled: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures decoding at one batch size.

    Args:
        batch: sequences decoded in a step
        new_tokens: tokens decoded in each run
        compiled: whether decoder layers are compiled

    Returns:
        A row of ``decode`` (see ``bench``), and the reason for each of ``FALLBACKS`` that was used.
    """
    prompt_tokens = min(PROMPT_TOKENS, max(1, max_seq_len(model.config) - new_tokens))
    ids = _random_ids(model, batch, prompt_tokens)
    row: dict[str, Any] = {"batch": batch}
    try:
        decoder = Decoder(model, batch, prompt_tokens + new_tokens + 1)
        decoder.prefill(ids)
        step_bytes = bytes_per_step(decoder)
        decoder.prefill(ids)
        decoder.prepare(compile_layers=compiled)
    except Unsupported as error:
        row["tokens_per_second"] = _rate(_generate_seconds(model, ids, new_tokens), batch * new_tokens)
        row["execution"] = "model.generate"
        row["seconds"] = {}
        return row, {"decoded_by_transformers": str(error)}

    def decode() -> None:
        for _ in decoder.decode(new_tokens):
            pass

    seconds = []
    for _ in range(1 + NUM_RUNS):
        decoder.prefill(ids)
        seconds.append(_time(model.device, decode))
    row["tokens_per_second"] = _rate(seconds[1:], batch * new_tokens)
    row["execution"] = decoder.execution
    row["bytes_per_step"] = step_bytes
    row["seconds"] = decoder.seconds
    return row, decoder.reasons


def _generate_seconds(model: Any, ids: Tensor, new_tokens: int) -> list[float]:
    """Returns the seconds that ``model.generate`` takes for ``new_tokens`` tokens after the first one, of each run."""

    def seconds(count: int) -> float:
        def generate() -> None:
            mask = torch.ones_like(ids)
            limits = {"max_new_tokens": count, "min_new_tokens": count}
            model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)

        return _time(model.device, generate)

    seconds(2)
    return [seconds(new_tokens + 1) - seconds(1) for _ in range(NUM_RUNS)]


@torch.no_grad()
def time_prefill(model: Any, length: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures a prompt of ``length`` tokens up to its first new token.

    Returns:
        A row of ``prefill`` (see ``bench``), and the reason for each of ``FALLBACKS`` that was used.
    """
    ids = _random_ids(model, 1, length)
    forward: Callable[[], Any]
    reasons: dict[str, str]
    try:
        decoder = Decoder(model, 1, length + 1)
        decoder.prefill(ids)
        decoder.prepare(compile_layers=False)  # later prompts run fused, and in a CUDA graph
        forward, reasons = lambda: decoder.prefill(ids), decoder.reasons
    except Unsupported as error:
        forward, reasons = lambda: model(input_ids=ids), {"decoded_by_transformers": str(error)}
    seconds = [_time(model.device, forward) for _ in range(1 + NUM_RUNS)]
    return {"tokens": length, "tokens_per_second": _rate(seconds[1:], length)}, reasons


def _time(device: torch.device, function: Callable[[], Any]) -> float:
    """Returns the seconds of a call, including the work that it launches on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _rate(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    """Returns percentiles of tokens per second over runs of ``tokens`` tokens: p20 is a slow run, p80 a fast one."""
    rates = sorted(tokens / run_seconds for run_seconds in seconds)
    p20, _, _, p80 = statistics.quantiles(rates, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(rates), "p80": p80}


def _random_ids(model: Any, batch: int, length: int) -> Tensor:
    """Returns random token ids [batch, length] on the model's device, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)
