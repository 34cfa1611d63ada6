"""Distillation of the packed model: routers, norms, scales and offsets, with codes fixed.

The loss is the KL divergence from the full-precision model. Its logits are computed again from its last hidden states,
so that the T x V numbers of T tokens are never stored. The alternative is the next-token loss, with which the paper
tunes routers. ``distillation.student`` holds the model that is trained.

Validation micro-batches decide: a result that is not better on them, or not finite, is dropped.

Shapes: B windows, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.distillation.settings import Distillation
from gemq.distillation.student import GRAPH_HIDDEN_TENSORS, Student
from gemq.layers.reconstruction import QuantizedLayer
from gemq.layers.scheme import QuantizationScheme
from gemq.models.replay import Replay
from gemq.quant.trainable import epochs
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.progress import Tick


@dataclass
class Distilled:
    """Result of distillation. Without tensors if it was dropped.

    Attributes:
        tensors: Scales and offsets of the experts by their names in a checkpoint, uint8.
        tuned: Routers and norms by name inside the model, float32.
        loss_before: Loss per token on validation windows before distillation, in nats.
        loss_after: The same after distillation.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    loss_before: float = 0.0
    loss_after: float = 0.0


def distill(
    replay: Replay,
    load_layer: Callable[[int], QuantizedLayer],
    schemes: Sequence[QuantizationScheme],
    activations: Activations,
    teacher: ActivationStore,
    distillation: Distillation,
    tick: Tick,
    graph_bytes: int = 0,
) -> Distilled:
    """Distill a quantized model.

    Args:
        replay: The model. Only what is not quantized is used of its layers.
        load_layer: Loads a layer as it is stored.
        schemes: Widths of each layer.
        activations: Inputs of the first layer.
        teacher: Last hidden states [B, S, H] of the full-precision model, one for each micro-batch.
        distillation: Settings.
        tick: Called with the steps taken and the number of steps.
        graph_bytes: Working memory of one layer's step in bytes, which its CUDA graph keeps.
    """
    return _Distiller(replay, load_layer, schemes, activations, teacher, distillation, graph_bytes).run(tick)


class _Distiller:
    """Trains a student and keeps the best result."""

    def __init__(
        self,
        replay: Replay,
        load_layer: Callable[[int], QuantizedLayer],
        schemes: Sequence[QuantizationScheme],
        activations: Activations,
        teacher: ActivationStore,
        distillation: Distillation,
        graph_bytes: int,
    ):
        """Arguments as of ``distill``."""
        self.replay, self.distillation, self.training = replay, distillation, distillation.training
        self.windows_sharded = activations.can_shard_windows(replay.ranks)
        self.num_shards = replay.ranks.count if self.windows_sharded else 1
        self.activations = activations.gather_for_training(replay, self.windows_sharded)
        self.teacher = activations.gather(replay, teacher, self.windows_sharded)
        self.train_batches, self.val_batches = self.training.split(len(self.activations.ids))
        self.steps = self.training.epochs * len(self.train_batches)
        graph_bytes += GRAPH_HIDDEN_TENSORS * self.activations.hidden[0].nbytes * len(schemes)
        self.student = Student(replay, load_layer, schemes, distillation, self.steps, self.windows_sharded, graph_bytes)

    def run(self, tick: Tick) -> Distilled:
        """Train until validation micro-batches no longer improve, and return the best result."""
        student, training, steps_per_epoch = self.student, self.training, len(self.train_batches)
        best = Distilled(loss_before=self.validation_loss())
        best.loss_after = best.loss_before
        for step, position in enumerate(epochs(steps_per_epoch, training.epochs, training.seed), 1):
            self.train_step(self.train_batches[position])
            tick(step, self.steps)
            if step % steps_per_epoch:
                continue
            loss = self.validation_loss()
            improved = loss < best.loss_after and self.replay.ranks.run_on_first(student.is_finite)  # NaN is not less
            if not improved:
                break  # later epochs would do no better
            best = Distilled(student.tensors(), student.tuned(), best.loss_before, loss)
        student.close()
        return best

    def train_step(self, batch: int) -> None:
        """Train on one micro-batch."""
        inputs = self.student.forward(self.activations, batch)
        last_hidden = self.replay.leaf(inputs.pop())
        self.student.step(self.losses(batch, last_hidden), last_hidden, inputs, self.activations, batch)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss of the validation micro-batches, in nats per token."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.val_batches:
            hidden = self.student.forward(self.activations, batch)[-1]
            total += sum(loss.item() for loss in self.losses(batch, hidden))
        if self.windows_sharded:
            self.replay.ranks.all_reduce(total)
        return self.replay.ranks.run_on_first(lambda: total.item() / len(self.val_batches))

    def losses(self, batch: int, hidden: Tensor) -> Iterator[Tensor]:
        """Yield terms whose sum is the mean loss over tokens, in nats.

        Args:
            batch: Index of the micro-batch.
            hidden: Last hidden states [B, S, H] of the student.
        """
        ids, teacher_hidden = self.activations.ids[batch], self.teacher[batch]
        for windows in self.replay.logit_chunks(ids):
            logits = self.student.logits(ids[windows], hidden[windows])
            if self.distillation.loss == "next_token":
                share = len(ids[windows]) / (len(ids) * self.num_shards)
                yield F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[windows, 1:].flatten()) * share
                continue
            with torch.no_grad():
                teacher_log_probs = self.replay.logits(ids[windows], teacher_hidden[windows]).float().log_softmax(-1)
            log_probs = logits.float().log_softmax(-1)
            kl_sum = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="sum")
            yield kl_sum / (ids.numel() * self.num_shards)
