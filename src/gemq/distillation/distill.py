"""Training what is left after the codes: routers, norms, scales and offsets of the whole packed model.

The loss is the KL divergence from the full-precision model, whose logits are computed again from its last hidden
states, so that T x vocabulary numbers are never stored; or the next-token loss, with which the paper tunes routers.
The model that is trained stands in ``distillation.student``.

Held-out micro-batches decide: a result that is not better on them, or not finite, is dropped.
Shapes: B windows, S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gemq.calibration.activations import Activations
from gemq.distillation.student import GIVEN, Distillation, Student
from gemq.layers.refinement import RefinedLayer
from gemq.models.replay import Replay
from gemq.quant.trainable import epochs
from gemq.quant.widths import ExpertWidths
from gemq.runtime.activation_store import Batches
from gemq.runtime.progress import Tick


@dataclass
class Distilled:
    """What distillation gave. Empty when it was dropped.

    tensors: experts' scales and offsets by their checkpoint names, uint8
    tuned:   routers and norms by their name inside the model, float32
    before, after: the loss per token on held-out windows, in nats
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0


def distil(
    replay: Replay,
    refined: Callable[[int], RefinedLayer],
    widths: Sequence[Sequence[ExpertWidths]],
    dense_bits: int,
    activations: Activations,
    teacher: Batches,
    distillation: Distillation,
    stored: dict[str, torch.dtype],
    group_size: int,
    tick: Tick,
    beside: int = 0,
) -> Distilled:
    """Distils a quantized model.

    replay:      the model; of its layers only what is not quantized is taken
    refined:     gives a layer as it was finished
    activations: the inputs of the first layer
    teacher:     the full-precision model's last hidden states [B, S, H], one per micro-batch
    stored:      the type in which each parameter is kept: routers and norms are trained as they will be
    tick:        called with (steps done, all steps)
    beside:      bytes that a layer's step computes with, which CUDA graphs keep for themselves
    """
    training, ranks = distillation.training, replay.ranks
    sharded = activations.can_shard_windows(ranks)
    activations, teacher = activations.to_train(replay, sharded), activations.share(replay, teacher, sharded)
    parts = ranks.count if sharded else 1  # of a micro-batch
    train, held_out = training.split(len(activations.ids))
    per_epoch = len(train)
    steps = training.epochs * per_epoch
    beside += GIVEN * activations.hidden[0].nbytes * len(widths)
    student = Student(replay, refined, widths, dense_bits, distillation, steps, stored, group_size, sharded, beside)

    def losses(batch: int, hidden: Tensor) -> Iterator[Tensor]:
        """Parts of the mean over tokens, in nats, from the student's last hidden states [B, S, H]."""
        ids, wanted = activations.ids[batch], teacher[batch]
        for some in replay.windows_together(ids):
            logits = student.logits(ids[some], hidden[some])
            if distillation.loss == "next_token":
                share = len(ids[some]) / (len(ids) * parts)
                yield F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[some, 1:].flatten()) * share
                continue
            with torch.no_grad():
                expected = replay.logits(ids[some], wanted[some]).float().log_softmax(-1)
            of_part = F.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum")
            yield of_part / (ids.numel() * parts)

    @torch.no_grad()
    def held_out_loss() -> float:
        total = torch.zeros((), dtype=torch.float64)
        for batch in held_out:
            hidden = student.inputs(activations, batch)[-1]
            total += sum(part.item() for part in losses(batch, hidden))
        if sharded:
            ranks.all_reduce(total)
        return ranks.run_on_first(lambda: total.item() / len(held_out))

    best = Distilled(before=held_out_loss())
    best.after = best.before
    for step, number in enumerate(epochs(per_epoch, training.epochs, training.seed)):
        batch = train[number]
        inputs = student.inputs(activations, batch)
        last = replay.leaf(inputs.pop())
        student.descend(losses(batch, last), last, inputs, activations, batch)
        tick(step + 1, steps)
        if (step + 1) % per_epoch == 0:
            now = held_out_loss()
            if not (now < best.after and ranks.run_on_first(student.is_finite)):  # NaN is not less
                break  # the last epochs did no good, and the next ones would do worse
            best = Distilled(student.tensors(), student.tuned(), best.before, now)
    student.close()
    return best
