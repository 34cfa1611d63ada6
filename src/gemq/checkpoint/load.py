"""Loading packed checkpoints into Transformers.

Transformers asks the quantizer registered as ``gemq`` to prepare the empty model, fills tensors by name,
and calls back when done. Three steps follow: check all packed tensors against the files' headers
(Transformers would leave missing ones uninitialised), hang placeholders into the model for it to fill, and
afterwards move each layer's experts into flat buffers. ``docs/checkpoint-format.md`` describes what is
read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemq.checkpoint.format import PARTS, QUANT_METHOD, PackedFormat, UnpackedTensor, verify, verify_unpacked
from gemq.checkpoint.names import saved_names
from gemq.checkpoint.save import dense_state
from gemq.checkpoint.skeleton import forget_checksums, read_config, user_errors
from gemq.checkpoint.stored import DataCheck, StoredCheckpoint, check_no_adapter
from gemq.errors import UserError, shown
from gemq.kernels.modules import PackedLinear, PackedMatrices, make_packed
from gemq.models.auto_class import auto_class
from gemq.models.experts_adapter import adopt_experts
from gemq.models.size_limits import bounded_construction
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for
from gemq.runtime.safetensors_files import TensorSpec, is_file, read_json, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.py"]


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto", **kwargs: Any
) -> PreTrainedModel:
    """The model of a packed checkpoint, in eval mode.

    path:   a directory that gemq wrote, or the hub id of one
    device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the GPU when there is one
    dtype:  of activations and unquantized weights; ``auto`` takes the checkpoint's
    kwargs: go to ``from_pretrained`` (``revision``, ``device_map``, ``trust_remote_code`` ...)
    Raises UserError when it is not a gemq checkpoint, or when anything is missing or damaged.
    """
    register()
    device = str(device) if isinstance(device, torch.device) else device
    _check_arguments(path, device, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use device='cpu'")
    directory = local_directory(path, kwargs) / kwargs.get("subfolder", "")
    stored = StoredCheckpoint.open(directory)
    kwargs = {"trust_remote_code": False, "device_map": device, **kwargs, "use_safetensors": True, "dtype": dtype}
    config = read_config(directory, trust_remote_code=kwargs["trust_remote_code"])
    with user_errors(directory, "load"), bounded_construction(directory, stored.size):
        loaded: Any = auto_class(config).from_pretrained(path, **kwargs, output_loading_info=True)
    model, report = loaded
    if absent := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UserError(
            f"{len(absent)} tensors are missing or have the wrong shape, first: {absent[0]}: copy the checkpoint again"
        )
    model.config.return_dict = True  # outputs are read by name
    return model.eval()


def _check_arguments(path: object, device: object, dtype: object) -> None:
    """Raises UserError for arguments of ``load`` that mean nothing."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{shown(path)} is no path: give the directory of a checkpoint, or its hub id")
    names = [name for name, kind in vars(torch).items() if isinstance(kind, torch.dtype) and kind.is_floating_point]
    if not isinstance(dtype, torch.dtype) and dtype not in ("auto", *names):
        raise UserError(f"dtype cannot be {shown(dtype)}: give auto, float32, bfloat16 or float16")
    try:
        known = device == "auto" or torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        known = False
    if not known or not isinstance(device, str):
        raise UserError(f"there is no device {shown(device)}: give auto, cpu or cuda")


def local_directory(path: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """A checkpoint's directory: a local one as it is, a hub id's snapshot in the cache, downloaded if need be.

    kwargs: those of ``from_pretrained`` that say where on the hub and in which cache
    Raises UserError when there is no such directory or model.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    places = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES, **places))
    except (OSError, ValueError) as error:  # of the hub's own errors, all that may occur here are one of these
        raise UserError(f"{path} is neither a directory nor a model on the hub that can be reached") from error


class GemqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint, as Transformers passes it around."""

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.packed_format = PackedFormat.from_dict({"quant_method": QUANT_METHOD, **values})

    def to_dict(self) -> dict[str, Any]:
        return self.packed_format.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class GemqQuantizer(HfQuantizer):
    """Prepares the empty model for packed tensors and packs its experts densely when they have arrived."""

    quantization_config: GemqConfig

    def __init__(self, quantization_config: GemqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UserError("gemq does not quantize while loading: run gemq quantize, then load its output")
        self._format = quantization_config.packed_format
        # Known once the empty model is: dtype asked for, dtypes by parameter, shapes of packed matrices.
        self._dtype = torch.float32
        self._dtypes: dict[str, torch.dtype] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._data_check: DataCheck | None = None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called by ``save_pretrained``. Its config.json is written before, without checksums."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # then only the adapter is saved
            logging.getLogger("gemq").warning(
                "save_pretrained writes no checksums: inspect --verify needs gemq's own files"
            )
        return super().get_state_dict_and_metadata(model)

    @property
    def is_trainable(self) -> bool:
        """With adapters: gradients pass through packed weights, which stay as they are."""
        return True

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        self._dtype = dtype  # Transformers does not pass it on to the method below
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        packed = self._format
        stored = _stored_checkpoint(checkpoint_files, packed)
        forget_checksums(model.config)
        adopt_experts(model)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        self._shapes = matrix_shapes(model, packed)
        expected = packed.expected(self._shapes)
        found = _in_model_names(model, expected, stored.specs)
        verify(expected, found)
        if type(model).__name__ in (model.config.architectures or ()):  # another class may have a head of its own
            verify_unpacked(unpacked_tensors(model, packed), expected, found)
        stored.check_config()
        self._data_check = DataCheck(stored)
        for path, projections in packed.experts.items():
            _hang_placeholders(model.get_submodule(path), path, projections, expected)
        for path, width in packed.linears.items():
            rows, columns = self._shapes[path]
            bias = cast(nn.Linear, model.get_submodule(path)).bias
            linear = PackedLinear(rows, columns, width, self._group_size(path), bias, device="meta")
            linear._is_hf_initialized = True  # type: ignore[assignment]  # as below
            model.set_submodule(path, linear)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, projections in self._format.experts.items():
            experts = model.get_submodule(path)
            for proj, widths in projections.items():
                matrices = [_take(experts, e, proj) for e in range(len(widths))]
                setattr(experts, proj, PackedMatrices(matrices, widths, self._group_size(f"{path}.{proj}")))
        self._settle_dtypes(model)
        if self._data_check is not None:
            self._data_check.result()
        self._data_check = None

    def _group_size(self, kind: str) -> int:
        return group_size_for(self._shapes[kind][1], self._format.group_size)

    def _settle_dtypes(self, model: PreTrainedModel) -> None:
        """Casts what Transformers 5.17 leaves in the file's dtype: tensors that it renames."""
        kept = model._get_dtype_plan(self._dtype)  # modules that a family keeps in float32
        kept_names = build_glob_alternation(list(kept))[0] if kept else None
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and not (kept_names and kept_names.search(name)):
                parameter.data = parameter.data.to(wanted)


class _Placeholder(nn.Module):
    """Empty buffers of one expert's matrix on the meta device, for Transformers to fill by name."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        super().__init__()
        for part, spec in specs.items():
            self.register_buffer(part, torch.empty(spec.shape, dtype=torch.uint8, device="meta"))


def _hang_placeholders(
    experts: nn.Module,
    path: str,
    projections: Mapping[str, tuple[Width, ...]],
    expected: dict[str, TensorSpec],
) -> None:
    make_packed(experts, list(projections))
    # A family's weight initialisation, the experts' own or their parent's, looks for the 3-D parameters.
    experts._is_hf_initialized = True  # type: ignore[assignment]
    for proj in projections:
        nothing = torch.empty(0)
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        vars(experts)[proj] = nothing  # not a parameter; gone when the packed matrices come
    for e in range(len(projections["down_proj"])):
        expert = nn.Module()
        for proj in projections:
            specs = {part: expected[f"{path}.{e}.{proj}.{part}"] for part in PARTS}
            expert.add_module(proj, _Placeholder(specs))
        experts.add_module(str(e), expert)


def _take(experts: nn.Module, e: int, proj: str) -> PackedMatrix:
    """The loaded matrix of one expert; its placeholder goes."""
    expert = experts.get_submodule(str(e))
    placeholder = expert.get_submodule(proj)
    delattr(expert, proj)
    if not expert._modules:
        delattr(experts, str(e))
    matrix = PackedMatrix(*(placeholder.get_buffer(part) for part in PARTS))
    if matrix.codes.is_meta:
        raise UserError("packed experts cannot be offloaded: load without offload_buffers, or on device='cpu'")
    return matrix


def matrix_shapes(model: nn.Module, packed_format: PackedFormat) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every packed matrix kind, from a full-precision model (may be on the meta device).

    Raises UserError where the model does not have what the format lists.
    """
    shapes = {}
    for path, projections in packed_format.experts.items():
        experts = _submodule(model, path)
        for proj, widths in projections.items():
            weight = getattr(experts, proj, None)
            if not isinstance(weight, Tensor) or weight.dim() != 3:
                raise UserError(f"{path} of {type(model).__name__} has no fused {proj}: upgrade Transformers or gemq")
            if weight.shape[0] != len(widths):
                raise UserError(
                    f"config.json lists {len(widths)} widths for the {weight.shape[0]} experts of {path}: "
                    "copy the checkpoint again"
                )
            _check_top_k(model, path, len(widths))
            rows, columns = weight.shape[1:]
            transposed = getattr(experts, "is_transposed", False)
            shapes[f"{path}.{proj}"] = (columns, rows) if transposed else (rows, columns)
    for path in packed_format.linears:
        linear = _submodule(model, path)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{path} of {type(model).__name__} is not a linear layer: upgrade Transformers or gemq")
        shapes[path] = (linear.out_features, linear.in_features)
    return shapes


def _check_top_k(model: nn.Module, path: str, experts: int) -> None:
    """Raises UserError when the router beside experts chooses more of them than there are."""
    for router in _submodule(model, path.rpartition(".")[0]).children():
        top_k, weight = getattr(router, "top_k", None), getattr(router, "weight", None)
        choices = max(experts, len(weight) if isinstance(weight, Tensor) else 0)
        if isinstance(top_k, int) and not 1 <= top_k <= choices:
            raise UserError(
                f"config.json lets a token choose {top_k} of the {choices} experts of {path}: copy the checkpoint again"
            )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} has no {path}: load with gemq.load") from error


def unpacked_tensors(model: PreTrainedModel, packed_format: PackedFormat) -> dict[str, UnpackedTensor]:
    """Name on disk and what to expect of every tensor that is not packed. ``model`` may be on the meta device."""
    required = dense_state(model, packed_format)
    tied = {name: t for name, t in model.state_dict().items() if name in model.all_tied_weights_keys}
    return {
        name: UnpackedTensor(tuple(tensor.shape), tensor.is_floating_point(), required=name in required)
        for name, tensor in {**tied, **required}.items()
    }


def _stored_checkpoint(files: Sequence[str] | None, packed_format: PackedFormat) -> StoredCheckpoint:
    """The checkpoint that Transformers is about to read. Raises UserError for files that are pickled or damaged."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise UserError("a gemq checkpoint is loaded from its safetensors files: give from_pretrained its directory")
    directory = Path(files[0]).parent
    if len(files) > 1:  # shards may lie in folders of their own
        directory = Path(os.path.commonpath([Path(file).parent for file in files]))
    directory = next((d for d in (directory, *directory.parents[:2]) if is_file(d / "config.json")), directory)
    check_no_adapter(directory)
    config = read_json(directory / "config.json") if is_file(directory / "config.json") else {}
    return StoredCheckpoint(directory, config, packed_format, stored_tensors(map(Path, files)))


def _in_model_names(
    model: PreTrainedModel, expected: Mapping[str, TensorSpec], found: dict[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """``found`` with packed tensors under their in-model names; save_pretrained gives them the family's hub names."""
    if expected.keys() <= found.keys():
        return found
    aliases = {saved: name for name, saved in saved_names(model, expected).items()}
    return {aliases.get(name, name): spec for name, spec in found.items()}


def register() -> None:
    """Makes Transformers know gemq checkpoints. Calling it again does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(GemqConfig)
        register_quantizer(QUANT_METHOD)(GemqQuantizer)


register()
