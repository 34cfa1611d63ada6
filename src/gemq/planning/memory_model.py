"""How much memory a stage computes with, from shapes alone: beside layers, and beside activations that wait.

Knows structures and recipes, no weights and no machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gemq.allocation.divergence import ROWS
from gemq.errors import UserError
from gemq.kernels.training.differentiable_dequantize import UNPACKED_TOGETHER
from gemq.layers.candidate_training import expert_chunks, train_rooms
from gemq.layers.quantizer import CHUNK_BYTES
from gemq.models.config_values import layer_configs
from gemq.models.replay import LOGITS_TOGETHER
from gemq.models.source import calibration_window
from gemq.models.structure import Layer, Structure
from gemq.quant.widths import group_size_for, nominal_bits
from gemq.recipe import Recipe
from gemq.runtime.memory import Memory, gigabytes
from gemq.runtime.ranks import Ranks

MOST_CHOSEN = 8
"""Experts that a token chooses where a configuration does not tell: at most so many in nearly all families."""

TRAINED_BYTES = {torch.bfloat16: 11, torch.float32: 28}
"""Bytes a weight while it is trained on a GPU, by compute type: code, latent, moments, weight in use, gradients."""

CPU_TRAINED_BYTES = 90
"""The same on a CPU, where autograd keeps every step from latents to weights; measured on both reference models."""

LOSS_BYTES = {"scores": (12, 3), "distil": (20, 2)}
"""Bytes a logit in a loss and its gradient: of float32, and how many in the compute type if that is another."""

LOGIT_BYTES = 24
"""Bytes a logit while two models' predictions are compared: float32 copies, their log-softmax and the products."""

WORKSPACES = 900_000_000
"""On a GPU: what libraries of products take, routing that is kept, and what the allocator cannot give out again."""


@dataclass(frozen=True)
class Footprint:
    """A job's bytes for arithmetic. ``room`` is for the state of experts that are trained together.

    config: the model's
    """

    structure: Structure
    recipe: Recipe
    config: Any
    dtype: torch.dtype
    device: torch.device

    def stages(self, room: int) -> dict[str, int]:
        """Most bytes on the device for one layer's or one micro-batch's arithmetic, by stage: ladder, scores, refine
        (or reconstruct), distil. Others take less.
        """
        recipe, dtype, text = self.recipe, self.dtype, self.config.get_text_config()
        window = calibration_window(self.config, recipe.window)
        windows = max(1, recipe.batch_tokens // window)
        together = min(windows, max(1, LOGITS_TOGETHER // (window * text.vocab_size))) * window * text.vocab_size
        found = {"ladder": 0, "refine": 0}
        for stage in ("scores", "distil") if recipe.distil_epochs else ("scores",):
            bytes_of, others = LOSS_BYTES[stage]
            found[stage] = together * (bytes_of + others * dtype.itemsize * (dtype != torch.float32))
        chosen = experts_per_token(text)
        for layer in self.structure.layers:
            for stage, count in _Layer(layer, recipe, chosen, dtype, self.device, room).stages().items():
                if stage in found:
                    found[stage] = max(found[stage], count)
        beside = WORKSPACES if self.device.type == "cuda" else 0
        return {stage: count + beside for stage, count in found.items()}

    def working(self, room: int) -> int:
        """The most of ``stages``."""
        return max(self.stages(room).values())

    @property
    def least(self) -> int:
        """``working`` with the least room."""
        return self.working(train_rooms(self.device)[-1])

    def train_room(self, left: int) -> int:
        """The largest of ``train_rooms`` with which a job computes in ``left`` bytes, or else the smallest."""
        rooms = train_rooms(self.device)
        return next((room for room in rooms if self.working(room) <= left), rooms[-1])


def experts_per_token(text: Any) -> int:
    """Experts that a token chooses at most, from a text model's configuration: families name it differently."""
    names = (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
        "experts_per_token",
    )
    found = [
        next((value for n in names if isinstance(value := getattr(layer, n, None), int)), MOST_CHOSEN)
        for layer in layer_configs(text)
    ]
    return max(found, default=MOST_CHOSEN)


@dataclass(frozen=True)
class _Layer:
    """One layer's bytes, step by step. Follows ``build_layer``, ``run_scores``, ``refine_layer`` and ``distil``."""

    layer: Layer
    recipe: Recipe
    chosen: int
    dtype: torch.dtype
    device: torch.device
    room: int

    def stages(self) -> dict[str, int]:
        recipe, experts = self.recipe, self.layer.experts
        columns = {x.columns for x in self.layer.linears}
        squares = 4 * sum(c * c for c in columns)
        dense = max((16 * x.columns**2 + 8 * x.columns * x.rows for x in self.layer.linears), default=0)
        if experts is None:
            return dict.fromkeys(("ladder", "refine"), squares + dense)
        weights = experts.count * experts.weights_per_expert
        largest = max(m.rows * m.columns for m in experts.matrices) * experts.count
        widths, size = len(recipe.ladder_widths), self.dtype.itemsize
        of_experts = 4 * experts.count * sum(m.columns**2 for m in experts.matrices)
        means = 4 * sum(m.columns**2 for m in experts.matrices)
        forward = self._pairs(False) * Ranks(device=self.device).max_batches_per_forward
        collecting = squares + of_experts + max(forward, means)
        ladder = squares + of_experts + means + self._quantizing(widths)
        ladder = max(ladder, squares + dense + of_experts)
        refine = max(squares + of_experts + means + self._quantizing(1), weights * (1 + 2 * size) + 4 * largest // 8)
        if recipe.ladder_epochs:
            some = max(x.stop - x.start for x in expert_chunks(experts, widths, self.room))
            trained = some * experts.weights_per_expert * widths * self._trained
            share = widths * min(1.0, 2 * some / experts.count)  # of a micro-batch's pairs, at every width
            packed = round(weights * sum(map(nominal_bits, recipe.ladder_widths)) / 8 * 1.2)
            at_first = some * experts.weights_per_expert * widths * 3 + self._chunk(widths)  # codes and latents
            ladder = means + packed + max(at_first, trained + round(max(share, 0.25) * self._pairs(True)), packed)
            if self.device.type != "cuda":  # where moments wait is the device; of pairs less is kept than is counted
                ladder += of_experts - round(0.35 * share * self._pairs(True))
        if recipe.layer_epochs:
            trained = (weights + sum(x.rows * x.columns for x in self.layer.linears)) * TRAINED_BYTES.get(
                self.dtype, 28
            )
            # the next layer is not read meanwhile
            refine = max(refine, trained + self._pairs(True) - (weights * size if self.device.type == "cuda" else 0))
        return {
            "ladder": max(collecting, ladder),
            "scores": widths * weights * size + max(self._pairs(True), forward, 3 * largest),
            "refine": max(collecting, refine),
            "distil": 2 * weights * size + self._pairs(True) + 20 * min(UNPACKED_TOGETHER, largest),
        }

    @property
    def _trained(self) -> int:
        if self.device.type != "cuda":
            return CPU_TRAINED_BYTES
        return TRAINED_BYTES.get(self.dtype, TRAINED_BYTES[torch.float32])

    def _pairs(self, backward: bool) -> int:
        """A micro-batch's routed pairs on their way through the experts; in float32 where outputs are compared."""
        assert self.layer.experts is not None
        first, down = self.layer.experts.matrices
        each = (3 * first.columns + first.rows + 2 * down.columns) * self.dtype.itemsize
        if backward:
            each = max(2 * each, each + 5 * 4 * first.columns)
        return self.recipe.batch_tokens * self.chosen * each

    def _chunk(self, widths: int) -> int:
        """Hessians, factors and errors of the experts that are quantized together."""
        assert self.layer.experts is not None
        most = 0
        for m in self.layer.experts.matrices:
            each = 4 * m.columns * (3 * m.columns + widths * m.rows)
            count = max(1, min(self.layer.experts.count, CHUNK_BYTES // each))
            most = max(most, 4 * count * max(3 * m.columns**2, m.columns**2 + widths * m.rows * m.columns))
        return most

    def _quantizing(self, widths: int) -> int:
        """``_chunk`` and the grids of all experts, which are put together from those of chunks."""
        assert self.layer.experts is not None
        codes = []
        for m in self.layer.experts.matrices:
            groups = m.columns // group_size_for(m.columns, self.recipe.group_size)
            codes.append(widths * self.layer.experts.count * m.rows * (m.columns + 8 * groups))  # scales, offsets
        return sum(codes) + max(self._chunk(widths), *codes)


def tensor_bytes(model: Any, structure: Structure | None, dtype: torch.dtype) -> tuple[int, list[int]]:
    """Bytes on the device of everything outside the decoder layers, and of each layer; without structure, of all.

    model: may be on the meta device
    dtype: of floating-point parameters there; buffers keep their own
    """
    prefixes = [f"{layer.path}." for layer in structure.layers] if structure else []
    layers = [0] * len(prefixes)
    outside = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        cast = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
        count = tensor.numel() * (dtype if cast else tensor.dtype).itemsize
        index = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
        if index is None:
            outside += count
        else:
            layers[index] += count
    return outside, layers


def held_bytes(model: Any, structure: Structure, dtype: torch.dtype) -> int:
    """What a job holds on the device all the time: two layers, and embeddings, norms and head."""
    outside, layers = tensor_bytes(model, structure, dtype)
    return outside + sum(sorted(layers)[-2:])


def forward_bytes(
    config: Any, structure: Structure | None, dtype: torch.dtype, device: torch.device, tokens: int, window: int
) -> int:
    """Bytes to run ``tokens`` tokens through a model without gradients and to compare its logits with another's.

    structure: None for a model that is held whole; its experts, if any, are taken to be like dense layers
    window:    tokens that attend to each other
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    each = layer_configs(text)
    widest = max(int(getattr(config, "intermediate_size", 0) or 0) for config in each)
    largest, rows = 4 * hidden * hidden, tokens * max(8 * hidden, 3 * widest)
    for layer in structure.layers if structure else ():
        largest = max([largest, *(x.rows * x.columns for x in layer.linears)])
        if layer.experts is not None:
            first, down = layer.experts.matrices
            largest = max(largest, first.rows * first.columns, down.rows * down.columns)
            chosen = tokens * experts_per_token(text)
            rows = max(rows, chosen * (3 * first.columns + first.rows + 2 * down.columns))
    if getattr(text, "_attn_implementation", None) == "eager":  # it keeps scores and their softmax
        rows = max(rows, 2 * tokens * window * max(int(config.num_attention_heads) for config in each))
    layer_bytes = rows * dtype.itemsize + 3 * 4 * largest
    logits = int(text.vocab_size) * (2 * 4 * tokens + LOGIT_BYTES * min(tokens, ROWS))
    return max(layer_bytes, logits) + (WORKSPACES if device.type == "cuda" else 0)


def staging_bytes(model: Any, structure: Structure) -> int:
    """Host memory for reading one layer: as it is read, as it is fused, and pinned."""
    state = model.state_dict()
    sizes = [
        sum(t.numel() * t.element_size() for n, t in state.items() if n.startswith(f"{layer.path}."))
        for layer in structure.layers
    ]
    return 3 * max(sizes)


def check_staging(memory: Memory, model: Any, structure: Structure, texts: int = 0) -> None:
    """Raises UserError, saying what would do, when host memory does not hold the layer that is on its way to a GPU.

    texts: bytes of host memory for the tokens of the calibration texts
    """
    of_texts = _of_texts(texts)
    if memory.device.type == "cuda" and (staging := staging_bytes(model, structure)) + texts > memory.host.limit:
        raise UserError(
            f"--host-memory {gigabytes(memory.host.limit)} do not hold the layer that is on its way to the GPU"
            f"{of_texts}: give at least --host-memory {gigabytes(staging + texts)}"
        )


def _of_texts(texts: int) -> str:
    return f" and the tokens of the calibration texts ({gigabytes(texts)})" if texts else ""


def check_bounds(
    memory: Memory, model: Any, structure: Structure, recipe: Recipe, dtype: torch.dtype, texts: int = 0
) -> None:
    """Raises UserError, saying what would do, when the least that a job must have on its device is above its bound.

    Args:
        model: may be on the meta device
        texts: bytes of host memory for the tokens of the calibration texts
    """
    check_staging(memory, model, structure, texts)
    cuda = memory.device.type == "cuda"
    held = held_bytes(model, structure, dtype)
    working = Footprint(structure, recipe, model.config, dtype, memory.device).least
    least = held + working + (0 if cuda else texts)
    if least > memory.on_device.limit:
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} do not hold the model's embeddings and two of its "
            f"layers ({gigabytes(held)}) and what one layer takes to compute ({gigabytes(working)})"
            f"{'' if cuda else _of_texts(texts)}: give at least {memory.flag} {gigabytes(least)}"
        )
