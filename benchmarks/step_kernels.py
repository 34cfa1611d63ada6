"""Which kernels does a decode step run, and how long do they take? CUDA only, prints tables.

    python benchmarks/step_kernels.py decode [--shape olmoe-1b-7b-2.0] [--batch 1 4 16] [--compiled 1] [--weights bf16]
    python benchmarks/step_kernels.py prefill [--shape ...] [--tokens 2048] [--weights packed bf16 bf16-compiled]
    python benchmarks/step_kernels.py start [--shape ...]

``decode`` replays captured steps: the time of a step by the clock, the time of all kernels, and every kernel.
``prefill`` compares the time of a prompt by the clock with the time of its kernels: what lies between is the host.
``start`` writes a packed checkpoint and loads it in a new process whose caches of compiled kernels are empty. It prints
the seconds of each phase up to the first token, and of each kernel's compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

PROMPT = 128
STEPS = 128


def kernel_times(run: Callable[[], Any], repeats: int) -> list[tuple[str, float, float]]:
    """Profile ``repeats`` calls.

    Returns:
        Name, calls and microseconds of each kernel of one call, the longest first.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    times: dict[str, tuple[float, float]] = {}
    for event in profiler.key_averages():
        name = re.sub(r"at::native::|void |\(anonymous namespace\)::|<unnamed>::", "", event.key)[:86]
        count, total = times.get(name, (0.0, 0.0))
        times[name] = (count + event.count / repeats, total + event.self_device_time_total / repeats)
    return sorted(((name, *value) for name, value in times.items()), key=lambda item: -item[2])


def print_kernels(title: str, microseconds: float, times: list[tuple[str, float, float]], lines: int) -> None:
    """Print a table of kernels below a summary."""
    busy, launches = sum(us for _, _, us in times), sum(count for _, count, _ in times)
    print(f"\n{title}: {microseconds:.0f} us by the clock, {busy:.0f} us in {launches:.0f} kernels")
    for name, count, us in times[:lines]:
        print(f"  {us:8.1f} us {count:6.1f} x {us / max(count, 1e-9):7.2f}  {name}", flush=True)


def random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    """Draw a prompt."""
    return torch.randint(model.config.vocab_size, (batch, tokens), device="cuda")


def decode(args: argparse.Namespace) -> None:
    """Print the kernels of a step for each batch, and tokens/s."""
    from gemq.decoding.decoder import Decoder
    from gemq.models.experts import use_fast_experts
    from shapes import SHAPES, dense_model, packed_model

    is_packed = "packed" in args.weights
    model = (packed_model if is_packed else dense_model)(SHAPES[args.shape], "cuda")
    if not is_packed:
        use_fast_experts(model)
    for compiled in (False, True):
        for batch in args.compiled if compiled else args.batch:
            decoder = Decoder(model, batch, PROMPT + STEPS + 1)
            ids = random_ids(model, batch, PROMPT)
            decoder.prefill(ids)
            decoder.prepare(compile_layers=compiled)
            seconds = []
            for _ in range(4):
                decoder.prefill(ids)
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in decoder.decode(STEPS):
                    pass
                seconds.append((time.perf_counter() - began) / STEPS)
            step = statistics.median(seconds[1:])
            decoder.prefill(ids)
            title = f"{args.shape} {'packed' if is_packed else 'bf16'}, batch {batch}, {decoder.execution}, "
            title += f"{batch / step:.0f} tokens/s, {decoder.seconds}"
            print_kernels(title, 1e6 * step, kernel_times(decoder.step, 16), args.lines)
            for reason in decoder.reasons.values():
                print("  left out:", reason)


def prefill(args: argparse.Namespace) -> None:
    """Print the kernels of a prompt, for each kind of weights."""
    for weights in args.weights:
        _prefill(args, weights)
        torch.cuda.empty_cache()


def _prefill(args: argparse.Namespace, weights: str) -> None:
    """Print the kernels of a prompt."""
    from gemq.decoding.decoder import Decoder
    from gemq.models.experts import use_fast_experts
    from shapes import SHAPES, dense_model, packed_model

    model = (packed_model if weights == "packed" else dense_model)(SHAPES[args.shape], "cuda")
    if weights != "packed":
        use_fast_experts(model)
    decoder = Decoder(model, 1, args.tokens + 1)
    ids = random_ids(model, 1, args.tokens)
    decoder.prefill(ids)
    if weights != "bf16-compiled":
        decoder.prepare(compile_layers=False)  # finds the layers that can be fused
    seconds, launched = [], []
    with _compiled_layers(decoder) if weights == "bf16-compiled" else nullcontext():
        for _ in range(8):
            torch.cuda.synchronize()
            began = time.perf_counter()
            first = decoder.prefill(ids)
            launched.append(time.perf_counter() - began)
            first.tolist()
            seconds.append(time.perf_counter() - began)
        times = kernel_times(lambda: decoder.prefill(ids), 3)
    clock, host = statistics.median(seconds[3:]), statistics.median(launched[3:])
    title = f"{args.shape} {weights}, prompt of {args.tokens}: {args.tokens / clock:.0f} tokens/s"
    print_kernels(f"{title}, launched after {1e3 * host:.1f} ms", 1e6 * clock, times, args.lines)


def _compiled_layers(decoder: Any) -> Any:
    """Compile the layers of a decoder for its prompts: the baseline at its best."""
    from gemq.decoding.regional_compile import LayerCompiler
    from gemq.decoding.static_cache import StepCache, decoder_layers, modules_around_layers

    class PromptCache(StepCache):
        """A layer's cache, which is written from its start."""

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            """Write keys and values."""
            layer: Any = self.layers[0]
            layer.cumulative_length.zero_()
            return layer.update(key_states, value_states, *args, **kwargs)

    caches = [PromptCache([layer], decoder._position) for layer in decoder._cache.layers]
    layers = decoder_layers(decoder.model, len(caches))
    return LayerCompiler().compiled(layers, caches, modules_around_layers(decoder.model))


def start(args: argparse.Namespace) -> None:
    """Time a new process from its start to the first token, with empty caches."""
    import shapes

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "packed"
        shapes.write(shapes.SHAPES[args.shape], path, "cuda")
        torch.cuda.empty_cache()
        caches = {"TRITON_CACHE_DIR": f"{directory}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{directory}/inductor"}
        for title in ("empty caches", "second start"):
            print(f"\n{args.shape}, {title}", flush=True)
            command = [sys.executable, __file__, "first-token", "--path", str(path)]
            subprocess.run(command, env={**os.environ, **caches}, check=True)


def first_token(args: argparse.Namespace) -> None:
    """In a new process: print the seconds of each phase, and of each kernel's compilation."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        torch.cuda.synchronize()
        time_now = time.perf_counter()
        seconds[name], last = round(time_now - last, 2), time_now

    import transformers

    import gemq
    import gemq.checkpoint.load
    from gemq.decoding.decoder import Decoder

    transformers.OlmoeForCausalLM  # noqa: B018 - imported lazily
    lap("imports")
    torch.zeros(1, device="cuda")
    lap("device")
    model = gemq.load(args.path, device="cuda")
    lap("load")
    compiled = _record_compilations()
    decoder = Decoder(model, 1, 512)
    ids = random_ids(model, 1, PROMPT)
    lap("cache")
    decoder.prefill(ids).tolist()
    lap("first token")
    decoder.prepare(compile_layers=False)
    lap("capture")
    decoder.prefill(ids).tolist()
    lap("prompt again")
    print(json.dumps(seconds), decoder.seconds)
    for name, duration in sorted(compiled, key=lambda item: -item[1])[: args.lines]:
        print(f"  {duration:6.2f} s  {name}")


def _record_compilations() -> list[tuple[str, float]]:
    """Return a list that receives name and seconds of every kernel that Triton compiles from now on."""
    import triton

    compiled: list[tuple[str, float]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        name = getattr(src, "name", getattr(getattr(src, "fn", None), "__name__", "?"))
        compiled.append((f"{name}{' (from the cache)' if cache_hit else ''}", times.total / 1e6))

    triton.knobs.compilation.listener = listen
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("decode", "prefill", "start", "first-token"))
    parser.add_argument("--shape", default="olmoe-1b-7b-2.0")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--compiled", type=int, nargs="*", default=[1], help="batches with compiled layers")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--weights", nargs="+", default=["packed", "bf16", "bf16-compiled"])
    parser.add_argument("--lines", type=int, default=24, help="kernels in a table")
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"decode": decode, "prefill": prefill, "start": start, "first-token": first_token}[args.what](args)


if __name__ == "__main__":
    main()
