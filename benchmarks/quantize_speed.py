"""How fast are the stages of a job, a layer at a time? Prints a table and appends one CSV row a measurement.

    python benchmarks/quantize_speed.py [--shape olmoe ...] [--parts gptq scores candidates layers] [--batches 12]

Needs a GPU (--shape tiny runs anywhere, for a look). One layer of the true shape with random weights, random tokens,
bfloat16, through the functions that a job calls. ``seconds`` is a layer of a whole job: 524,288 tokens and 2 epochs for
training, 262,144 tokens for scores, as extrapolated from ``--batches`` micro-batches; ``limit`` is the larger of
operations over the rate of a large matrix product and bytes over the rate of a large copy, both measured first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gemq.allocation.scores import pair_costs, reverse_layer
from gemq.calibration.activations import Activations, layer_hessians
from gemq.calibration.expert_hessians import InputHessians
from gemq.calibration.windows import Windows
from gemq.layers.candidates import build_candidates
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import Targets, reconstruct_layer
from gemq.layers.training import Training
from gemq.models.experts import expert_weight, use_experts_forward
from gemq.models.replay import Replay
from gemq.models.structure import Experts, find_structure
from gemq.quant.hessian import factorize
from gemq.quant.widths import Width
from gemq.runtime.activation_store import ActivationStore
from record import RESULTS, append, environment

FILE = RESULTS / "quantize_speed.csv"
STEPS = ("gptq", "moments", "scores", "candidates", "layers")
WIDTHS = (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT)
GATE_UP_WIDTHS = (Width.TERNARY, Width.TWO_BIT, Width.TWO_BIT, Width.THREE_BIT)
DOWN_WIDTHS = (Width.TWO_BIT, Width.THREE_BIT)
BATCH, TRAIN_TOKENS, SCORE_TOKENS, EPOCHS = 4096, 524_288, 262_144, 2


@dataclass(frozen=True)
class Shape:
    family: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    heads: int
    layers: int
    seq_len: int = 2048

    def config(self) -> Any:
        from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

        common: dict[str, Any] = {
            "vocab_size": 1024,
            "hidden_size": self.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.seq_len,
        }
        if self.family == "mixtral":
            return MixtralConfig(
                intermediate_size=self.intermediate, num_local_experts=self.experts, num_key_value_heads=8, **common
            )
        if self.family == "qwen3":
            return Qwen3MoeConfig(
                moe_intermediate_size=self.intermediate,
                intermediate_size=6144,
                num_experts=self.experts,
                num_key_value_heads=4,
                **common | {"head_dim": 128},
            )
        return OlmoeConfig(
            intermediate_size=self.intermediate, num_experts=self.experts, num_key_value_heads=self.heads, **common
        )


SHAPES = {
    "olmoe": Shape("olmoe", 2048, 1024, 64, 8, 16, 16),
    "mixtral": Shape("mixtral", 4096, 14336, 8, 2, 32, 32),
    "qwen3-30b-a3b": Shape("qwen3", 2048, 768, 128, 8, 32, 48),
    "tiny": Shape("olmoe", 128, 64, 8, 2, 4, 2, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["olmoe"])
    parser.add_argument("--parts", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", type=int, default=12, help="micro-batches of 4096 tokens")
    parser.add_argument("--csv", type=Path, default=FILE)
    args = parser.parse_args()
    bench = Bench(args.csv, torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.batches)
    print(f"{bench.rate / 1e12:.0f} TFLOP/s, {bench.bandwidth / 1e12:.2f} TB/s", flush=True)
    for name in args.shape:
        bench.start(name, SHAPES[name])
        for step in args.parts:
            getattr(bench, step)()


class Bench:
    """One layer of a shape at a time, and the machine's two limits."""

    def __init__(self, file: Path, device: torch.device, batches: int):
        self.file, self.device, self.batches = file, device, batches
        small = device.type == "cpu"
        a = torch.randn(*(2 * (256 if small else 8192,)), device=device, dtype=torch.bfloat16)
        self.rate = 2 * len(a) ** 3 / self.seconds(lambda: a @ a, 10)
        x = torch.empty(1 << (20 if small else 31), device=device, dtype=torch.uint8)
        y = torch.empty_like(x)
        self.bandwidth = 2 * len(x) / self.seconds(lambda: y.copy_(x), 10)

    def seconds(self, function: Callable[[], Any], times: int = 1) -> float:
        """Of one call, after one to warm up if there are several."""
        if times > 1:
            function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            function()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def start(self, name: str, shape: Shape) -> None:
        from transformers import AutoModelForCausalLM

        self.name, self.shape = name, shape
        self.model = None
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        use_experts_forward(model)  # as jobs do
        self.model = model
        self.replay = Replay(model, find_structure(model))
        self.layer = self.replay.structure.layers[0]
        assert self.layer.experts is not None
        self.experts: Experts = self.layer.experts
        self.module = model.get_submodule(self.experts.path)
        seq_len = shape.seq_len
        ids = torch.randint(0, 1024, (max(2, self.batches * BATCH // seq_len if name != "tiny" else 8), seq_len))
        windows = Windows(ids, torch.zeros(len(ids), dtype=torch.int64), ("random",), (ids.numel(),))
        self.activations = Activations.start(self.replay, windows, BATCH if name != "tiny" else 256, 0)
        self.quantizer = Quantizer("gptq", 128, 0.01, 0.1)
        self.weights = self.experts.count * self.experts.weights_per_expert
        self.active = shape.top_k * self.experts.weights_per_expert
        self.dense = sum(x.rows * x.columns for x in self.layer.linears)

    def row(self, step: str, seconds: float, operations: float, moved: float, **others: Any) -> None:
        limit = max(operations / self.rate, moved / self.bandwidth)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        cells = {
            "shape": self.name,
            "part": step,
            "seconds": float(seconds),
            "limit": limit,
            "times_limit": seconds / limit,
            "all_layers": seconds * self.shape.layers,
            "peak_gb": peak / 1e9,
            "note": others.get("note", ""),
        }
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in cells.items()), flush=True)
        append(self.file, {**cells, **environment()})
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def input_hessians(self) -> InputHessians:
        """Empty Hessians of all experts."""
        return InputHessians(self.experts, slice(0, self.experts.count), self.device)

    def moments(self) -> None:
        """A layer forward with the second moments of everything; limit by the products alone, half of each."""
        run = lambda: layer_hessians(self.replay, 0, self.activations, self.layer.linears, [self.input_hessians()])
        run()
        scale = TRAIN_TOKENS / (len(self.activations.ids) * self.activations.ids[0].numel())
        first, down = self.experts.matrices
        squares = self.shape.top_k * (first.columns**2 + down.columns**2)
        operations = TRAIN_TOKENS * (2 * (self.active + self.dense) + squares)
        self.row("moments", self.seconds(run) * scale, operations, 0.0)

    def gptq(self) -> None:
        inputs = self.input_hessians()
        layer_hessians(self.replay, 0, self.activations, [], [inputs])
        pairs = list(zip(self.experts.matrices, inputs.by_matrix(), strict=True))
        for widths in ((Width.TWO_BIT,), (Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT), WIDTHS):

            def run(widths: tuple[Width, ...] = widths) -> None:
                for matrix, moment in pairs:
                    self.quantizer.quantize_all(expert_weight(self.module, matrix.name), moment, widths)

            run()
            operations = moved = 0.0
            for matrix, _ in pairs:
                square, count = matrix.columns**2, self.experts.count
                # factor and inverse; errors into later columns: float32, at a twelfth of the rate of bfloat16
                operations += 12 * count * (matrix.columns * square + len(widths) * matrix.rows * square)
                moved += count * (8 * square + matrix.rows * matrix.columns * (2 + 9 * len(widths)))
            self.row(f"gptq {len(widths)}", self.seconds(run), operations, moved)
        for matrix, moment in pairs:
            hessians = moment.hessians(0.1)
            seconds = self.seconds(lambda h=hessians: factorize(h, 0.01), 2)  # type: ignore[misc]
            print(f"    of it factorize {matrix.name}: {seconds:.3f} s", flush=True)

    def scores(self) -> None:
        first, down = (expert_weight(self.module, m.name) for m in self.experts.matrices)
        candidates = [(first * (1 + 0.1 * i), down * (1 + 0.1 * i)) for i in range(3)]

        def run() -> None:
            gradients = ActivationStore(self.replay.memory, (torch.randn_like(h) for h in self.activations.hidden))
            with torch.no_grad():
                for hidden, calls in zip(self.activations.hidden, self.activations.calls, strict=True):
                    self.replay.run(0, hidden, calls[0])
            for _, call, gradient in reverse_layer(self.replay, 0, self.activations, gradients):
                assert call is not None
                assert gradient is not None
                pair_costs(self.module, self.experts, call, gradient, candidates, "token", 2)

        run()
        done = len(self.activations.ids) * self.activations.ids[0].numel()
        operations = SCORE_TOKENS * 2.0 * ((self.active + self.dense) * 4 + self.active * 4)
        self.row("scores 3", self.seconds(run) * SCORE_TOKENS / done, operations, 0.0)

    def _training(self, epochs: int) -> Training:
        return Training(epochs, 5e-3, 2e-3, 1e-3, 0.05, 0)

    def _steps(self) -> tuple[int, float]:
        """Training steps an epoch here, and in a whole job."""
        measured_steps = len(self._training(1).split(len(self.activations.ids))[0])
        tokens = self.activations.ids[0].numel()
        return measured_steps, EPOCHS * len(self._training(1).split(TRAIN_TOKENS // tokens)[0])

    def _extrapolated(self, run: Callable[[int], Any]) -> tuple[float, float]:
        """Seconds of a whole job's steps and of the rest, from runs of one epoch and of three."""
        run(1)
        seconds_1, seconds_3 = self.seconds(lambda: run(1)), self.seconds(lambda: run(3))
        measured_steps, job_steps = self._steps()
        return (seconds_3 - seconds_1) / (2 * measured_steps) * job_steps, seconds_1 - (seconds_3 - seconds_1) / 2

    def candidates(self) -> None:
        """Training only: quantizing is ``gptq``."""
        seconds, fixed_seconds = self._extrapolated(
            lambda epochs: build_candidates(
                self.replay, 0, self.activations, self.quantizer, WIDTHS, Width.FOUR_BIT, self._training(epochs)
            )
        )
        tokens = self.activations.ids[0].numel()
        steps = self._steps()[1]
        operations = steps * tokens * self.active * (6.0 * len(WIDTHS) + 2)
        # soft_codes and moments in and out, weight and gradient in and out, weight for both products
        moved = steps * self.weights * len(WIDTHS) * (2 * 6.0 + 2 + 2 + 2 + 2 + 2)
        self.row("candidates", seconds, operations, moved, note=f"rest {fixed_seconds:.2f} s")

    def layers(self) -> None:
        exact = ActivationStore(self.replay.memory)
        with torch.no_grad():
            for hidden, calls in zip(self.activations.hidden, self.activations.calls, strict=True):
                exact.append(self.replay.run(0, hidden, calls[0]))
        stored_dtypes = {name: torch.bfloat16 for name, _ in self.replay.model.named_parameters()}
        widths = [(GATE_UP_WIDTHS[e % 4], DOWN_WIDTHS[e % 2]) for e in range(self.experts.count)]

        def run(epochs: int) -> None:
            targets = Targets(exact, stored_dtypes, self._training(epochs))
            reconstruct_layer(self.replay, 0, self.activations, self.quantizer, widths, Width.FOUR_BIT, targets)

        seconds, fixed_seconds = self._extrapolated(run)
        tokens = self.activations.ids[0].numel()
        steps = self._steps()[1]
        operations = steps * tokens * (self.active + self.dense) * 6.0
        moved = steps * (self.weights + self.dense) * (2 * 6.0 + 2 + 2 + 2 + 2 + 2)
        self.row("layers", seconds, operations, moved, note=f"rest {fixed_seconds:.2f} s")


if __name__ == "__main__":
    main()
