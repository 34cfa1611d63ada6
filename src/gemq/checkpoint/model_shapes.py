"""The tensors that a packed checkpoint must hold, derived from the model on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.save import dense_state
from gemq.checkpoint.verification import UnpackedTensor
from gemq.errors import UserError
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def matrix_shapes(model: nn.Module, packed_format: PackedFormat) -> dict[str, tuple[int, int]]:
    """Returns (rows, columns) of every packed matrix kind.

    Args:
        model: the full-precision model; may be on the meta device
        packed_format: which matrices are packed

    Raises:
        UserError: the model does not have a matrix that the format lists.
    """
    shapes = {}
    for path, projections in packed_format.experts.items():
        experts = _submodule(model, path)
        for projection, widths in projections.items():
            weight = getattr(experts, projection, None)
            if not isinstance(weight, Tensor) or weight.dim() != 3:
                raise UserError(
                    f"{path} of {type(model).__name__} has no fused {projection}: upgrade Transformers or gemq"
                )
            if weight.shape[0] != len(widths):
                raise UserError(
                    f"config.json lists {len(widths)} widths for the {weight.shape[0]} experts of {path}: "
                    "copy the checkpoint again"
                )
            _check_top_k(model, path, len(widths))
            rows, columns = weight.shape[1:]
            is_transposed = getattr(experts, "is_transposed", False)
            shapes[f"{path}.{projection}"] = (columns, rows) if is_transposed else (rows, columns)
    for path in packed_format.linears:
        linear = _submodule(model, path)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{path} of {type(model).__name__} is not a linear layer: upgrade Transformers or gemq")
        shapes[path] = (linear.out_features, linear.in_features)
    return shapes


def _check_top_k(model: nn.Module, path: str, num_experts: int) -> None:
    """Raises UserError if a router next to the experts at ``path`` chooses more experts than there are."""
    for router in _submodule(model, path.rpartition(".")[0]).children():
        top_k = getattr(router, "top_k", None)
        weight = getattr(router, "weight", None)
        choices = max(num_experts, len(weight) if isinstance(weight, Tensor) else 0)
        if isinstance(top_k, int) and not 1 <= top_k <= choices:
            raise UserError(
                f"config.json lets a token choose {top_k} of the {choices} experts of {path}: copy the checkpoint again"
            )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """Returns a module of the model. Raises UserError if there is none at ``path``."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} has no {path}: load with gemq.load") from error


def unpacked_tensors(model: PreTrainedModel, packed_format: PackedFormat) -> dict[str, UnpackedTensor]:
    """Returns the tensors that are not packed, by name in the files. ``model`` may be on the meta device."""
    required = dense_state(model, packed_format)
    tied = transformers_private.tied_weights(model)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name in tied and name not in required:
            expected[name] = UnpackedTensor(tuple(tensor.shape), tensor.is_floating_point(), is_required=False)
    for name, tensor in required.items():
        expected[name] = UnpackedTensor(tuple(tensor.shape), tensor.is_floating_point())
    return expected
