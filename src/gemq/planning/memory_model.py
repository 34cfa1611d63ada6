"""Bytes of memory from shapes alone: of a model's parts, and of a layer's temporary tensors.

The stages of a job add these up in their ``peak_bytes`` functions, and evaluation in ``forward_bytes``. No weights are
needed. Layers and activations that are kept for later are not counted: ``runtime.memory`` places them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gemq.allocation.divergence import POSITIONS_PER_CHUNK
from gemq.errors import UserError
from gemq.layers.expert_reconstruction import compensation_passes
from gemq.layers.output_hessians import is_practical
from gemq.layers.quantizer import CHUNK_BYTES, COMPENSATION_BYTES, COMPENSATION_COPIES, TRELLIS_COPIES
from gemq.models.config_values import experts_per_token, layer_configs
from gemq.models.layer_cache import reserved_layer_bytes
from gemq.models.replay import MAX_LOGITS_PER_CHUNK
from gemq.models.source import calibration_seq_len
from gemq.models.structure import Experts, Layer, Structure
from gemq.quant.trellis import SEARCH_BYTES
from gemq.quant.widths import MAX_EIGHTHS, group_size_for
from gemq.recipe import Recipe
from gemq.runtime.compat import transformers_private
from gemq.runtime.integers import ceil_div
from gemq.runtime.memory import MemoryBudget, gigabytes
from gemq.runtime.ranks import Ranks

TRAINED_BYTES = {torch.bfloat16: 11, torch.float32: 28}
"""Bytes a weight while it is trained on a GPU, by compute type: code, soft code, moments, weight in use, gradients."""

CPU_TRAINED_BYTES = 90
"""The same on a CPU, where autograd keeps all tensors between soft codes and weights. Measured on two models."""

CPU_SEARCH_BYTES = 1 << 28
"""Memory that the search for trellis codes takes on a CPU for a batch of tiles."""

KL_LOGIT_BYTES = 24
"""Bytes a logit while two models' predictions are compared: float32 copies, their log-softmax and the products."""

GPU_WORKSPACE_BYTES = 900_000_000
"""On a GPU: workspaces of matrix product libraries, routing that is kept, and fragmentation of the allocator."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of the temporary tensors of one layer.

    Attributes:
        layer: the layer's shapes.
        recipe: widths, group size and micro-batches.
        experts_per_token: that the router chooses at most.
        dtype: compute type.
        device: where the layer computes.
    """

    layer: Layer
    recipe: Recipe
    experts_per_token: int
    dtype: torch.dtype
    device: torch.device

    @property
    def experts(self) -> Experts:
        """The experts of a layer that has them."""
        assert self.layer.experts is not None
        return self.layer.experts

    @property
    def on_gpu(self) -> bool:
        """Whether the layer computes on a GPU."""
        return self.device.type == "cuda"

    @property
    def expert_weights(self) -> int:
        """Number of weights of all experts."""
        return self.experts.count * self.experts.weights_per_expert

    @property
    def linear_weights(self) -> int:
        """Number of weights of the dense linears."""
        return sum(linear.rows * linear.columns for linear in self.layer.linears)

    @property
    def largest_matrices(self) -> int:
        """Number of weights of all experts' larger matrix."""
        return self.experts.count * max(matrix.rows * matrix.columns for matrix in self.experts.matrices)

    @property
    def trained_bytes(self) -> int:
        """Bytes a weight while experts are trained on their own."""
        return self.layer_trained_bytes if self.on_gpu else CPU_TRAINED_BYTES

    @property
    def layer_trained_bytes(self) -> int:
        """Bytes a weight while the whole layer is trained."""
        return TRAINED_BYTES.get(self.dtype, TRAINED_BYTES[torch.float32])

    @property
    def dense_hessians(self) -> int:
        """Hessians of the dense linears; those that receive the same tensor share one."""
        input_sizes = {linear.columns for linear in self.layer.linears}
        return 4 * sum(columns**2 for columns in input_sizes)

    @property
    def dense_quantization(self) -> int:
        """GPTQ of the largest dense linear: Hessian, factors, weights and errors."""
        sizes = []
        for linear in self.layer.linears:
            hessians = 4 * linear.columns**2  # Hessian, dampened copy, its factor and the inverse
            weights = 2 * linear.columns * linear.rows  # weights and errors
            sizes.append(4 * (hessians + weights))
        return max(sizes, default=0)

    @property
    def mean_hessians(self) -> int:
        """A mean Hessian of each of the experts' two matrices."""
        return 4 * sum(matrix.columns**2 for matrix in self.experts.matrices)

    @property
    def expert_hessians(self) -> int:
        """The Hessians of all experts."""
        return self.experts.count * self.mean_hessians

    @property
    def slope_moments(self) -> int:
        """Moments of the derivatives at the outputs of all experts' first matrix, for feedback between rows."""
        if not self.recipe.has_output_feedback or not is_practical(self.experts):
            return 0
        return 4 * (self.experts.count + 1) * self.experts.matrices[0].rows ** 2

    @property
    def slope_pairs(self) -> int:
        """Derivatives of a forward pass of the experts."""
        if not self.slope_moments:
            return 0
        first, down = self.experts.matrices
        pairs = self.recipe.micro_batch_tokens * self.experts_per_token
        pair_bytes = (3 * first.rows + 2 * down.columns) * self.dtype.itemsize
        return pairs * pair_bytes * Ranks(device=self.device).max_batches_per_forward

    @property
    def forward_pairs(self) -> int:
        """A forward pass of the experts, of as many micro-batches as are run at the same time."""
        return self.routed_pairs(backward=False) * Ranks(device=self.device).max_batches_per_forward

    @property
    def collecting_hessians(self) -> int:
        """Hessians while they are collected in a forward pass, or finished."""
        return self.dense_hessians + self.expert_hessians + max(self.forward_pairs, self.mean_hessians)

    @property
    def compensating(self) -> int:
        """Compensation of down projections: Hessians, changes, quantized first matrices, and the new weights."""
        if not self.recipe.compensate:
            return 0
        first, down = self.experts.matrices
        count = self.experts.count
        experts_per_pass = ceil_div(count, compensation_passes(self.experts, 1))
        moments = 4 * (count + experts_per_pass) * down.columns**2
        codes = count * first.rows * first.columns  # at most a byte each
        dense = self.expert_weights * self.dtype.itemsize
        chunk_bytes = 4 * down.columns * (3 * down.columns + COMPENSATION_COPIES * down.rows)  # of one expert
        pairs = self.forward_pairs * 5 // 4  # inputs with both first matrices
        computing = max(pairs, min(count * chunk_bytes, max(chunk_bytes, COMPENSATION_BYTES)))
        return moments + codes + dense + computing

    def routed_pairs(self, backward: bool) -> int:
        """A micro-batch's routed pairs on their way through the experts.

        Args:
            backward: a backward pass follows, or outputs are compared in float32.
        """
        up, down = self.experts.matrices
        pair_bytes = (3 * up.columns + up.rows + 2 * down.columns) * self.dtype.itemsize
        if backward:
            pair_bytes = max(2 * pair_bytes, pair_bytes + 5 * 4 * up.columns)
        return self.recipe.micro_batch_tokens * self.experts_per_token * pair_bytes

    def expert_chunk(self, widths: int, output_copies: int = 0) -> int:
        """Hessians, factors and errors of the experts that are quantized at the same time, at ``widths`` widths.

        Args:
            widths: number of widths, or of copies of the weights.
            output_copies: tensors as large as the Hessians of the outputs.
        """
        largest = 0
        for index, m in enumerate(self.experts.matrices):
            with_outputs = index == 1 or is_practical(self.experts)
            output_numbers = output_copies * m.rows**2 if with_outputs else 0
            expert_bytes = 4 * (m.columns * (3 * m.columns + widths * m.rows) + output_numbers)
            count = max(1, min(self.experts.count, CHUNK_BYTES // expert_bytes))
            hessian_numbers = 3 * m.columns**2
            error_numbers = m.columns**2 + widths * m.rows * m.columns
            largest = max(largest, 4 * count * (max(hessian_numbers, error_numbers) + output_numbers))
        return largest

    def expert_quantization(self, widths: int, output_copies: int = 0) -> int:
        """Codes and grids of all experts at ``widths`` widths, while they are computed or joined from chunks.

        ``output_copies`` counts with trellis codes alone.
        """
        if self.recipe.codes == "trellis":
            return self.trellis_quantization(widths, output_copies)
        matrix_codes = []
        for m in self.experts.matrices:
            groups = m.columns // group_size_for(m.columns, self.recipe.group_size)
            row_bytes = m.columns + 8 * groups  # codes, scales and offsets
            matrix_codes.append(widths * self.experts.count * m.rows * row_bytes)
        return sum(matrix_codes) + max(self.expert_chunk(widths), *matrix_codes)

    def trellis_quantization(self, widths: int, output_copies: int = 0) -> int:
        """Trellis codes of all experts at ``widths`` widths, weights in use, and the experts of one batch."""
        stored = self.expert_weights * widths * MAX_EIGHTHS // 64
        search = SEARCH_BYTES if self.on_gpu else CPU_SEARCH_BYTES
        in_use = self.expert_weights * self.dtype.itemsize
        return stored + in_use + search + 3 * self.expert_chunk(TRELLIS_COPIES, output_copies) // 2


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of temporary tensors of a model.

    Attributes:
        structure: the model's shapes.
        recipe: widths, group size and micro-batches.
        config: the model's configuration.
        dtype: compute type.
        device: where the model computes.
    """

    structure: Structure
    recipe: Recipe
    config: Any
    dtype: torch.dtype
    device: torch.device

    def largest_layer(self, layer_bytes: Callable[[LayerMemory], int]) -> int:
        """The maximum of ``layer_bytes`` over all layers, and the device's workspace."""
        experts = experts_per_token(self.config.get_text_config())
        sizes = [
            layer_bytes(LayerMemory(layer, self.recipe, experts, self.dtype, self.device))
            for layer in self.structure.layers
        ]
        return max(sizes) + self.workspace_bytes

    def loss(self, float32_bytes: int, copies: int) -> int:
        """A loss and its gradient, and the device's workspace.

        Args:
            float32_bytes: bytes a logit of float32 tensors.
            copies: tensors of logits in the compute type, if that is another.
        """
        vocabulary = self.config.get_text_config().vocab_size
        seq_len = calibration_seq_len(self.config, self.recipe.seq_len)
        windows_per_batch = max(1, self.recipe.micro_batch_tokens // seq_len)
        windows = min(windows_per_batch, max(1, MAX_LOGITS_PER_CHUNK // (seq_len * vocabulary)))
        logit_bytes = float32_bytes
        if self.dtype != torch.float32:
            logit_bytes += copies * self.dtype.itemsize
        return windows * seq_len * vocabulary * logit_bytes + self.workspace_bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes that a GPU's libraries take."""
        return GPU_WORKSPACE_BYTES if self.device.type == "cuda" else 0


def tensor_bytes(model: Any, structure: Structure | None, dtype: torch.dtype) -> tuple[int, list[int]]:
    """Bytes on the device of everything outside the decoder layers, and of each layer; without structure, of all.

    Args:
        model: may be on the meta device.
        structure: where the layers are; None for a model that is held as one.
        dtype: of floating-point parameters on the device. Buffers keep their own.
    """
    prefixes = [f"{layer.path}." for layer in structure.layers] if structure else []
    layers = [0] * len(prefixes)
    outside = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_cast = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
        size = tensor.numel() * (dtype if is_cast else tensor.dtype).itemsize
        index = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if index is None:
            outside += size
        else:
            layers[index] += size
    return outside, layers


def held_bytes(model: Any, structure: Structure, dtype: torch.dtype) -> int:
    """What a job holds on the device throughout: two layers, and embeddings, norms and head."""
    outside, layers = tensor_bytes(model, structure, dtype)
    return outside + reserved_layer_bytes(layers)


def forward_bytes(
    config: Any, structure: Structure | None, dtype: torch.dtype, device: torch.device, tokens: int, seq_len: int
) -> int:
    """Bytes to run a model without gradients and to compare its logits with another model's.

    Args:
        config: the model's.
        structure: None for a model that is held as one. Its experts, if any, are assumed to be like dense layers.
        dtype: compute type.
        device: where the model computes.
        tokens: that are run at the same time.
        seq_len: tokens that attend to each other.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    configs = layer_configs(text)
    widest = max(int(getattr(config, "intermediate_size", 0) or 0) for config in configs)
    largest_matrix = 4 * hidden * hidden  # where the linears are not known: a dense layer of usual proportions
    numbers = tokens * max(8 * hidden, 3 * widest)  # of attention, or of a dense layer: gate, up and their product
    for layer in structure.layers if structure else ():
        for linear in layer.linears:
            largest_matrix = max(largest_matrix, linear.rows * linear.columns)
        if layer.experts is not None:
            up, down = layer.experts.matrices
            largest_matrix = max(largest_matrix, up.rows * up.columns, down.rows * down.columns)
            pairs = tokens * experts_per_token(text)
            numbers = max(numbers, pairs * (3 * up.columns + up.rows + 2 * down.columns))
    if transformers_private.attention_implementation(text) == "eager":  # it keeps scores and their softmax
        heads = max(int(config.num_attention_heads) for config in configs)
        numbers = max(numbers, 2 * tokens * seq_len * heads)
    layer_bytes = numbers * dtype.itemsize + 3 * 4 * largest_matrix
    logit_bytes = int(text.vocab_size) * (2 * 4 * tokens + KL_LOGIT_BYTES * min(tokens, POSITIONS_PER_CHUNK))
    return max(layer_bytes, logit_bytes) + (GPU_WORKSPACE_BYTES if device.type == "cuda" else 0)


def staging_bytes(model: Any, structure: Structure) -> int:
    """Host memory for reading one layer: as it is read, as it is fused, and pinned."""
    state = model.state_dict()
    sizes = [
        sum(t.numel() * t.element_size() for name, t in state.items() if name.startswith(f"{layer.path}."))
        for layer in structure.layers
    ]
    return 3 * max(sizes)


def check_staging(memory: MemoryBudget, model: Any, structure: Structure, texts: int = 0) -> None:
    """Checks that host memory holds one layer that is being copied to a GPU.

    Args:
        memory: the job's bounds.
        model: may be on the meta device.
        structure: the model's.
        texts: bytes of host memory for the tokens of the calibration texts.

    Raises:
        UserError: it does not. The message says which bound would do.
    """
    if memory.device.type != "cuda":
        return
    required = staging_bytes(model, structure) + texts
    if required > memory.host.limit:
        raise UserError(
            f"--host-memory {gigabytes(memory.host.limit)} is too small for a layer that is being copied to the GPU"
            f"{text_note(texts)}: give at least --host-memory {gigabytes(required)}"
        )


def text_note(texts: int) -> str:
    """For messages: that the tokens of calibration texts take memory as well; empty if there are none."""
    return f" and the tokens of the calibration texts ({gigabytes(texts)})" if texts else ""
