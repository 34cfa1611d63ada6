"""What each stage of a job computes, counted from shapes and the recipe: the estimates of ``plan`` rest on it.

Counts follow what the stages do (see each function). Knows structures and recipes; ``machine`` measures how fast a
machine is. Shapes: T tokens, H hidden size, I intermediate size, E experts, K experts a token, W widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gemq.allocation.guard import OWN, PER_SOURCE, UNIFORM_SEEDS
from gemq.allocation.sensitivity import measured_tokens
from gemq.calibration.self_generation import batch_size, cache_bytes, side_by_side
from gemq.calibration.sources import SELF
from gemq.layers.candidates import LINEAR_TOKENS
from gemq.models.structure import Experts, Layer, Structure
from gemq.planning.memory_model import experts_per_token
from gemq.quant.widths import group_size_for
from gemq.recipe import Recipe
from gemq.runtime.device import Rates, measure
from gemq.runtime.ranks import GPU_BATCHES_PER_FORWARD, batches_per_forward

GUARD_TRIES = 3
"""Allocations that the guard is expected to look at: the one that scores make, and softer ones."""

DENSE_PASSES = 45.0
"""Numbers of a token's hidden size that a layer reads and writes beside its products: norms, residuals, rotations."""
EXPERT_PASSES = 9.0
"""The same for each routed pair, of the hidden and of the intermediate size."""
DENSE_CALLS, EXPERT_CALLS = 150.0, 10.0
"""PyTorch operations of one call of a layer, and those that each expert adds."""
GPU_DENSE_CALLS, GPU_EXPERT_CALLS = 60.0, 20.0
"""The same on a GPU, where most run behind the device's back and all experts are one product."""
GPU_GPTQ = 45.0
"""Operations of bfloat16 products in the time of one of GPTQ's float32 ones: factors, and errors into later columns."""
GPU_TRAINED_BYTES = 22.0
"""As ``TRAINED_BYTES``, in one pass over latents and moments of 16 bits."""
LOGIT_BYTES = 24.0
"""Read and written for each logit by a softmax and what is made of it, in float32."""
FIT_BYTES = 760.0
"""Read and written for each weight by fitting a grid: six rounds of rounding and least squares."""
COLUMN_BYTES, UPDATE_BYTES = 80.0, 16.0
"""The same for rounding a column, and for each of the columns that its error then changes."""
DEQUANTIZED_BYTES = 30.0
"""Read and written for each weight while torch unpacks codes and multiplies them out."""
UNPACKED_BYTES = 2.5
"""The same by a GPU's kernel in distillation, which reads codes and writes weights, or reads their gradients."""
TRAINED_BYTES = 150.0
"""Read and written for each weight in a step of training: rounding, its gradient, AdamW."""

REPLAYED = 0.2
"""What an operation costs that a CUDA graph replays, of what it costs to launch: written windows, lab log, entry 24."""


@dataclass(frozen=True)
class Work:
    """Counts of what takes time; the rates of ``machine`` have the same names."""

    products: float = 0.0
    bytes: float = 0.0
    near: float = 0.0
    calls: float = 0.0
    draws: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(a * times for a in self._values()))

    def seconds(self, rates: Rates) -> float:
        """One after the other: an upper bound where they overlap."""
        return sum(getattr(self, name) / getattr(rates, name) for name in Work.__dataclass_fields__)

    def _values(self) -> tuple[float, ...]:
        return self.products, self.bytes, self.near, self.calls, self.draws


def total(parts: Iterable[Work]) -> Work:
    return sum(parts, start=Work())


@dataclass(frozen=True)
class Workload:
    """A job's counts.

    hidden, vocabulary: of the model; ``per_token``: experts that a token chooses
    window:   tokens per calibration window
    itemsize: bytes of the compute type; ``windows_at_once``: that the model writes side by side, at least
    on_gpu:   count as its kernels work; ``most_at_once``: windows that it has room for there
    """

    structure: Structure
    recipe: Recipe
    hidden: int
    vocabulary: int
    per_token: int
    window: int
    itemsize: int
    windows_at_once: int
    on_gpu: bool = False
    most_at_once: int = 0

    @classmethod
    def of(
        cls,
        structure: Structure,
        recipe: Recipe,
        config: Any,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: int = 0,
    ) -> Workload:
        """config: the model's; it computes in ``dtype`` on ``device``

        memory: bytes that it may hold there beside what it computes with
        """
        text = config.get_text_config()
        free = memory - structure.total_parameters * dtype.itemsize
        return cls(
            structure,
            recipe,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            per_token=experts_per_token(text),
            window=window,
            itemsize=dtype.itemsize,
            windows_at_once=batch_size(text, window),
            on_gpu=device.type == "cuda",
            most_at_once=free // cache_bytes(text, window, dtype.itemsize),
        )

    def seconds(self, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """What each stage is expected to take on ``device``, which is measured for a second."""
        experts = self.structure.moe_layers[0][1].experts
        assert experts is not None
        rates = measure(device, dtype, experts.matrices[0].rows, experts.matrices[0].columns)
        return {name: work.seconds(rates) for name, work in self.stages().items()}

    # Stages

    def stages(self) -> dict[str, Work]:
        """The stages of the job that the recipe asks for, in order, by the names that its bars have."""
        r, layers = self.recipe, self.structure.layers
        scored = r.allocate in ("global", "layerwise")
        guarded = scored and r.guard and r.refine
        judge = OWN + PER_SOURCE * (SELF in r.calib) if guarded else 0
        along = judge if self._added_windows and r.calib != (SELF,) else 0  # written in the same batches
        stages = {
            "calibration windows": self.generate(self._own_windows + along),
            "ladder": total(map(self.ladder, layers)),
        }
        if scored and r.rescale:
            stages["sensitivity"] = self.sensitivity()
        if scored:
            stages["scores"] = (self.loss() + total(map(self.scores, layers))) * self._budgets
        if guarded:
            stages["guard windows"] = self.generate(judge - along)
            stages["guard"] = self.guard()
        if r.refine:
            stages[self._refine_stage] = total(map(self.refine, layers)) * self._budgets
            if r.distil_epochs:
                stages["distil"] = self.distil() * self._budgets
        return {name: work for name, work in stages.items() if work != Work()}

    @property
    def rounds(self) -> dict[str, int]:
        """Stages that a progressive recipe goes through several times, and how often."""
        names = ("scores", self._refine_stage, "distil") if self._budgets > 1 else ()
        return {name: self._budgets for name in self.stages() if name in names}

    @property
    def _budgets(self) -> int:
        return max(1, len(self.recipe.progressive))

    @property
    def _refine_stage(self) -> str:
        return "reconstruct" if self.recipe.layer_epochs else "refine"

    @property
    def _own_windows(self) -> int:
        """Windows that the model writes: its share of the sources', and those that the effort adds."""
        r = self.recipe
        of_sources = r.windows // len(r.calib) if SELF in r.calib else 0
        return of_sources + self._added_windows

    @property
    def _added_windows(self) -> int:
        return int((self.tokens - self.given_tokens) // self.window)

    def generate(self, windows: int) -> Work:
        """``windows`` written token by token: a step reads all weights for one token of each window of a batch."""
        if not windows:
            return Work()
        at_once = self.windows_at_once
        if self.on_gpu:
            at_once = side_by_side(windows, at_once, self.most_at_once)
        batches = -(-windows // at_once)
        steps, tokens = self.window * batches, windows * self.window
        work = total(self.forward(x, tokens, self.window // 2, steps) for x in self.structure.layers)
        weights = self.structure.total_parameters * self.itemsize
        logits = tokens * self.vocabulary * LOGIT_BYTES
        work += self.head(tokens) + Work(bytes=logits, near=steps * weights, calls=40 * steps)
        return dataclasses.replace(work, calls=work.calls * REPLAYED) if self.on_gpu else work

    def ladder(self, layer: Layer) -> Work:
        work = self.forward(layer, self.tokens) + self.moments(layer) + self.gptq(layer, self.widths)
        epochs = self.recipe.ladder_epochs
        if not epochs:
            return work
        if layer.linears and self.recipe.attention_bits < 16:
            some = min(self.tokens, LINEAR_TOKENS) * epochs
            dense = sum(x.rows * x.columns for x in layer.linears)
            batches = some / self.batch_tokens
            work += self.forward(layer, some, batches=batches) * 3 + self.train(dense, batches)
        if layer.experts is None:
            return work
        steps, tokens = self._steps(epochs)
        once = self.experts(layer, tokens, steps)
        judged = self.experts(layer, self.tokens * self.recipe.held_out * 2, 2) * (1 + self.widths)
        weights = layer.experts.count * layer.experts.weights_per_expert * self.widths
        return work + once * (1 + 3 * self.widths) + judged + self.train(weights, steps)

    def loss(self) -> Work:
        """Logits, the gradient that goes back through them, and labels drawn from them."""
        logits = float(self.scored_tokens * self.vocabulary)
        drawn = logits if self.recipe.score_labels == "sampled" else 0.0
        return self.head(self.scored_tokens) * 2 + Work(bytes=logits * 2 * LOGIT_BYTES, draws=drawn)

    def scores(self, layer: Layer) -> Work:
        """Forward, forward again and back; then every routed pair in full precision and at each width."""
        tokens = self.scored_tokens
        batches = tokens / self.batch_tokens
        work = self.forward(layer, tokens) + self.forward(layer, tokens, batches=batches) * 2
        if layer.experts is None:
            return work
        pairs = self.experts(layer, tokens, batches) * (1 + self.widths)
        each = 40.0 if self.on_gpu else 16.0  # a CPU's caches hold what comes between
        differences = tokens * self.per_token * self.widths * self.hidden * each
        return work + pairs + Work(bytes=differences) + self.dequantize(layer) * self.widths

    def sensitivity(self) -> Work:
        """Every layer at every width, all else exact: each such model runs from that layer to the end."""
        tokens = float(measured_tokens(self.tokens))
        work, models = Work(), 0
        for layer in self.structure.layers:
            if layer.experts is not None:
                models += self.widths
                work += self.dequantize(layer) * self.widths
            work += self.forward(layer, tokens, batches=tokens / (self.batch_tokens * self.at_once)) * (1 + models)
        return work + (self.head(tokens) + Work(bytes=tokens * self.vocabulary * LOGIT_BYTES)) * (1 + models)

    def guard(self) -> Work:
        """Candidates beside full precision: the allocation and uniform, softer ones, and each source left out."""
        r = self.recipe
        given = [name for name in r.calib if name != SELF]
        windows = PER_SOURCE * len(r.calib) + OWN
        draws = 1 if float(r.bits or 2.0).is_integer() else UNIFORM_SEEDS
        passes = windows * (2 + draws + 2 * (GUARD_TRIES - 1)) + 2 * (GUARD_TRIES - 1) * PER_SOURCE * len(given)
        tokens = passes * self.window
        work = total(
            self.forward(x, tokens) + self.dequantize(x) * (draws + GUARD_TRIES) for x in self.structure.layers
        )
        return work + self.head(tokens) + Work(bytes=tokens * self.vocabulary * LOGIT_BYTES)

    def refine(self, layer: Layer) -> Work:
        """GPTQ on the quantized model's activations, then training towards the full-precision layer's outputs."""
        r = self.recipe
        attends = r.attention_bits < 16 and any(x.kind == "attention" for x in layer.linears)
        passes = 2 + attends + bool(r.layer_epochs or r.distil_epochs)
        work = self.forward(layer, self.tokens) * passes + self.moments(layer) + self.gptq(layer, 1)
        work += self.dequantize(layer)
        if not r.layer_epochs:
            return work
        steps, tokens = self._steps(r.layer_epochs)
        seen = self.tokens * r.held_out * 2
        judged = self.forward(layer, seen, batches=seen / self.batch_tokens)
        return work + self.forward(layer, tokens, batches=steps) * 3 + judged + self.train(self._weights(layer), steps)

    def distil(self) -> Work:
        """Each step runs a layer forward, again for its gradient, and back; its experts are dequantized twice."""
        steps, tokens = self._steps(self.recipe.distil_epochs)
        judged = self.tokens * self.recipe.held_out * (1 + self.recipe.distil_epochs)
        work = self.head(tokens * 3 + judged * 2) + Work(bytes=(tokens + judged) * self.vocabulary * 2.0 * LOGIT_BYTES)
        for layer in self.structure.layers:
            by_kernel = Work(bytes=self._weights(layer) * UNPACKED_BYTES, calls=20)
            unpacking = by_kernel if self.on_gpu else self.dequantize(layer)
            work += self.forward(layer, tokens, batches=steps) * 4 + unpacking * (3 * steps)
            work += self.forward(layer, judged, batches=judged / self.batch_tokens)
        return work

    # Parts

    @property
    def given_tokens(self) -> int:
        """In windows of the sources."""
        return self.recipe.windows * self.window

    @property
    def tokens(self) -> int:
        """Of calibration, those that the effort adds included."""
        added = -(-max(0, self.recipe.total_tokens - self.given_tokens) // self.window)
        return self.given_tokens + added * self.window

    @property
    def scored_tokens(self) -> int:
        """Of calibration, those that scores take."""
        return min(self.tokens, self.recipe.score_tokens or self.tokens)

    @property
    def batch_tokens(self) -> int:
        return max(1, self.recipe.batch_tokens // self.window) * self.window

    @property
    def batches(self) -> int:
        """Micro-batches of calibration."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def at_once(self) -> int:
        """Micro-batches of any kind that go through a layer at once where nothing is trained."""
        return GPU_BATCHES_PER_FORWARD if self.on_gpu else 1

    @property
    def together(self) -> int:
        """Neighbours among calibration's that do (see ``Ranks``)."""
        return batches_per_forward(self.batches, self.at_once)

    @property
    def widths(self) -> int:
        return len(self.recipe.ladder_widths)

    def _steps(self, epochs: int) -> tuple[int, int]:
        """Steps of training, and the tokens that they see."""
        batches = self.batches - min(max(1, round(self.recipe.held_out * self.batches)), self.batches - 1)
        return epochs * batches, epochs * batches * self.batch_tokens

    def _weights(self, layer: Layer) -> int:
        """Weights of a layer that are quantized."""
        experts = layer.experts.count * layer.experts.weights_per_expert if layer.experts else 0
        return experts + sum(x.rows * x.columns for x in layer.linears if self.recipe.attention_bits < 16)

    def forward(self, layer: Layer, tokens: float, context: int | None = None, batches: float | None = None) -> Work:
        """One layer on ``tokens`` tokens, each of which sees ``context`` others (default: a window).

        batches: in which they go through it; by default those that go through it together where nothing is trained
        """
        batches = tokens / (self.batch_tokens * self.together) if batches is None else batches
        dense = sum(x.rows * x.columns for x in layer.linears)
        attends = any(x.kind == "attention" for x in layer.linears)
        attention = 4.0 * self.hidden * (self.window if context is None else context) * attends
        moved = DENSE_PASSES * self.hidden * self.itemsize
        calls = GPU_DENSE_CALLS if self.on_gpu else DENSE_CALLS
        work = Work(tokens * (2.0 * dense + attention), tokens * moved, calls=calls * batches)
        return work + self.experts(layer, tokens, batches) if layer.experts else work

    def experts(self, layer: Layer, tokens: float, batches: float) -> Work:
        """The routed experts alone: gathering, two products, the gate, weighting and summing."""
        assert layer.experts is not None
        pairs = tokens * self.per_token
        inside = layer.experts.matrices[1].columns
        moved = EXPERT_PASSES * (self.hidden + inside) * self.itemsize
        calls = batches * self._expert_calls(layer.experts)
        return Work(2.0 * pairs * layer.experts.weights_per_expert, pairs * moved, calls=calls)

    def _expert_calls(self, experts: Experts) -> float:
        return GPU_EXPERT_CALLS if self.on_gpu else EXPERT_CALLS * experts.count

    def head(self, tokens: float) -> Work:
        """Logits."""
        return Work(2.0 * tokens * self.hidden * self.vocabulary)

    def moments(self, layer: Layer) -> Work:
        """Second moments of what the matrices receive, the experts' intermediates computed once more."""
        seen = {(x.path.rpartition(".")[2] in SAME_INPUT and "q_proj") or x.path: x.columns**2 for x in layer.linears}
        work = Work(2.0 * self.tokens * sum(seen.values()) * (self.recipe.attention_bits < 16))
        if layer.experts is None:
            return work
        first, down = layer.experts.matrices
        pairs = self.tokens * self.per_token
        products = 2.0 * (first.rows * first.columns + first.columns**2 + down.columns**2)
        moved = 3.0 * (first.columns + first.rows + down.columns) * self.itemsize
        runs = self.batches / self.together
        calls = runs * self._expert_calls(layer.experts)
        sums = 4.0 * layer.experts.count * (first.columns**2 + down.columns**2) * runs if self.on_gpu else 0.0
        return work + Work(pairs * products, pairs * moved + sums, calls=calls)

    def gptq(self, layer: Layer, widths: int) -> Work:
        """Every expert at ``widths`` widths and every dense linear at one."""
        matrices = [(x.rows, x.columns, 1, 1) for x in layer.linears if self.recipe.attention_bits < 16]
        if layer.experts:
            matrices += [(m.rows, m.columns, layer.experts.count, widths) for m in layer.experts.matrices]
        work = Work()
        for rows, columns, count, times in matrices:
            weights = float(rows * columns * count * times)
            group = group_size_for(columns, self.recipe.group_size)
            if self.on_gpu:
                work += Work(GPU_GPTQ * (count * columns**3 + weights * columns), calls=columns / group * 6)
                continue
            work += Work(near=weights * FIT_BYTES)
            if self.recipe.quantizer == "gptq":  # after each column half of its group, on average, is updated
                near = weights * (COLUMN_BYTES + group / 2 * UPDATE_BYTES)
                factor = count * (4.0 / 3 * columns**3)
                work += Work(factor + weights * columns, near=near, calls=columns * 16 + columns / group * 200)
        return work

    def dequantize(self, layer: Layer) -> Work:
        """A layer's codes unpacked and multiplied out."""
        return Work(bytes=self._weights(layer) * DEQUANTIZED_BYTES, calls=60)

    def train(self, weights: float, steps: float) -> Work:
        """Latents to weights, gradients back to them, and the optimizer: all weights at each step."""
        each = GPU_TRAINED_BYTES if self.on_gpu else TRAINED_BYTES
        return Work(bytes=weights * steps * each, calls=100 * steps)


SAME_INPUT = ("q_proj", "k_proj", "v_proj")
