"""Counts what the stages of a job compute, from shapes and the recipe, to estimate how long they take.

Each stage states its work next to its code, in terms of the costs of layers below. Divided by the rates of a device
(``runtime.device.measure``) it gives seconds. The estimate ignores overlap, files and compilation. Expect it to be
right within a factor of two or three; the shares of the stages are more accurate than their lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gemq.models.config_values import experts_per_token
from gemq.models.structure import Layer, Structure
from gemq.recipe import Recipe
from gemq.runtime.device import Rates
from gemq.runtime.integers import ceil_div
from gemq.runtime.ranks import GPU_BATCHES_PER_FORWARD, batches_per_forward

DENSE_PASSES, EXPERT_PASSES = 45, 9
"""Elementwise reads and writes: of a token's hidden state in a layer, and of a pair's hidden and intermediate state."""

OPTIMIZER_CALLS = 100
"""Operations that a step of the optimizer launches."""

LOGIT_BYTES = 24
"""Read and written for each logit by a softmax and a loss."""


class DeviceCosts(NamedTuple):
    """Costs that differ between devices, fitted to measured jobs."""

    layer_calls: int
    """Operations that a call of a layer launches."""
    expert_calls: int
    """Operations that it launches for each expert."""
    product_slowdown: float
    """Time of a product in a forward pass, as a multiple of the measured time."""
    weight_reads: float
    """Time to read all weights while windows are generated, as a multiple of an elementwise pass."""
    gptq_products: int
    """Floating-point operations of GPTQ for each weight and column."""
    gptq_bytes: int
    """Read and written for each weight by fitting a grid and rounding."""
    trellis_bytes: int
    """The search for trellis codes of a weight, as the bytes that are read and written in its time."""
    train_bytes: int
    """Read and written for each weight by a training step: rounding, its gradient, AdamW."""


CPU = DeviceCosts(
    layer_calls=150,
    expert_calls=10,
    product_slowdown=1.0,
    weight_reads=0.3,
    gptq_products=1,
    gptq_bytes=250,
    trellis_bytes=400_000,
    train_bytes=150,
)
GPU = DeviceCosts(
    layer_calls=80,
    expert_calls=0,
    product_slowdown=1.5,
    weight_reads=2.5,
    gptq_products=45,
    gptq_bytes=0,
    trellis_bytes=6_000,
    train_bytes=20,
)


@dataclass(frozen=True)
class Work:
    """Operations of a stage, in the units of ``runtime.device.Rates``.

    Attributes:
        products: floating-point operations of matrix products.
        bytes: read and written by elementwise operations.
        calls: operations launched.
    """

    products: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.bytes * times, self.calls * times)

    def seconds(self, rates: Rates) -> float:
        """The time on a device with these rates, one kind of operation after the other."""
        return self.products / rates.products + self.bytes / rates.bytes + self.calls / rates.calls


@dataclass(frozen=True)
class Workload:
    """The size of a job, and what a layer costs in it.

    Attributes:
        structure: the model's layers.
        recipe: of the job.
        config: the model's.
        seq_len: tokens per calibration window.
        dtype: compute type.
        device: where the job computes.
        memory: bytes that weights and caches may take on the device.
    """

    structure: Structure
    recipe: Recipe
    config: Any
    seq_len: int
    dtype: torch.dtype
    device: torch.device
    memory: int = 0

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.config.get_text_config()

    @property
    def costs(self) -> DeviceCosts:
        """Costs of the device."""
        return GPU if self.device.type == "cuda" else CPU

    @property
    def widths(self) -> int:
        """Number of candidate widths."""
        return len(self.recipe.candidate_widths)

    @property
    def added_windows(self) -> int:
        """Calibration windows that the effort adds to those of the sources."""
        missing_tokens = self.recipe.total_tokens - self.recipe.num_windows * self.seq_len
        return ceil_div(max(0, missing_tokens), self.seq_len)

    @property
    def tokens(self) -> int:
        """Calibration tokens, those that the effort adds included."""
        return (self.recipe.num_windows + self.added_windows) * self.seq_len

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens in a micro-batch: whole windows."""
        return max(1, self.recipe.micro_batch_tokens // self.seq_len) * self.seq_len

    @property
    def batches(self) -> int:
        """Micro-batches of calibration."""
        return ceil_div(self.tokens, self.micro_batch_tokens)

    def training_steps(self, epochs: int) -> int:
        """Steps of training on the calibration tokens that are not held out, one micro-batch each."""
        return epochs * max(1, round((1 - self.recipe.val_fraction) * self.batches))

    def quantized_weights(self, layer: Layer) -> int:
        """Weights of a layer that are quantized."""
        weights = layer.experts.count * layer.experts.weights_per_expert if layer.experts else 0
        if self.recipe.dense_width is not None:
            weights += sum(linear.rows * linear.columns for linear in layer.linears)
        return weights

    def forward(self, layer: Layer, tokens: float, calls: float | None = None) -> Work:
        """A layer's forward pass on ``tokens`` tokens, in ``calls`` calls of the layer.

        By default the calls of stages that train nothing: on a GPU several micro-batches share one.
        """
        if calls is None:
            limit = GPU_BATCHES_PER_FORWARD if self.device.type == "cuda" else 1
            calls = tokens / (self.micro_batch_tokens * batches_per_forward(self.batches, limit))
        hidden = self.text_config.hidden_size
        weights = sum(linear.rows * linear.columns for linear in layer.linears)
        if any(linear.kind == "attention" for linear in layer.linears):
            weights += 2 * hidden * self.seq_len  # keys and values of a window take part like weights
        passes = tokens * DENSE_PASSES * hidden * self.dtype.itemsize
        products = 2 * tokens * weights * self.costs.product_slowdown
        work = Work(products, passes, calls * self.costs.layer_calls)
        return work + self.experts(layer, tokens, calls)

    def experts(self, layer: Layer, tokens: float, calls: float) -> Work:
        """The forward pass of a layer's routed experts alone; nothing in a dense layer."""
        if layer.experts is None:
            return Work()
        pairs = tokens * experts_per_token(self.text_config)
        size = self.text_config.hidden_size + layer.experts.matrices[1].columns
        passes = pairs * EXPERT_PASSES * size * self.dtype.itemsize
        products = 2 * pairs * layer.experts.weights_per_expert * self.costs.product_slowdown
        return Work(products, passes, calls * layer.experts.count * self.costs.expert_calls)

    def head(self, tokens: float) -> Work:
        """Logits, and their softmax or loss."""
        logits = tokens * self.text_config.vocab_size
        products = 2 * logits * self.text_config.hidden_size * self.costs.product_slowdown
        return Work(products, logits * LOGIT_BYTES)

    def quantize(self, layer: Layer, widths: int) -> Work:
        """Hessians and GPTQ of every expert at ``widths`` widths, and of the dense linears at one.

        Args:
            layer: the layer.
            widths: number of widths.
        """
        hessian_products, gptq_products = 0.0, 0.0
        for linear in layer.linears if self.recipe.dense_width is not None else ():
            hessian_products += 2 * self.tokens * linear.columns**2
            gptq_products += linear.columns**2 * (linear.rows + linear.columns)  # rounding, factorization
        if layer.experts is not None:
            pairs = self.tokens * experts_per_token(self.text_config)
            for matrix in layer.experts.matrices:
                hessian_products += 2 * pairs * matrix.columns**2
                gptq_products += layer.experts.count * matrix.columns**2 * (widths * matrix.rows + matrix.columns)
        passes = widths * self.quantized_weights(layer) * self.costs.gptq_bytes
        if layer.experts is not None and self.recipe.codes == "trellis":
            expert_weights = layer.experts.count * layer.experts.weights_per_expert
            passes += widths * expert_weights * self.costs.trellis_bytes
        return Work(hessian_products + self.costs.gptq_products * gptq_products, passes)

    def train(self, weights: float, steps: float) -> Work:
        """Steps of the optimizer on ``weights`` quantized weights."""
        return Work(bytes=weights * steps * self.costs.train_bytes, calls=OPTIMIZER_CALLS * steps)
