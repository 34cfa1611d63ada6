"""Loads packed checkpoints into Transformers.

Importing this module registers the quantizer. Until then a placeholder is registered (``gemq.register``), which
imports this module when Transformers reads the configuration of a packed checkpoint. Transformers asks the quantizer
to prepare the empty model, fills tensors by name, and calls the quantizer again at the end. The quantizer compares
all packed tensors with the headers of the files, since Transformers would leave missing ones uninitialized. It then
adds placeholders to the model for Transformers to fill. At the end it moves the experts of each layer into contiguous
buffers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemq.checkpoint.bounded_load import fit_into, memory_bound
from gemq.checkpoint.format import ABOUT_KEYS, QUANT_METHOD, PackedFormat, ProjectionWidths, fields_of
from gemq.checkpoint.model_shapes import matrix_shapes, unpacked_tensors
from gemq.checkpoint.names import stored_names
from gemq.checkpoint.skeleton import build_skeleton, read_config, remove_checksums, user_errors
from gemq.checkpoint.stored import BackgroundDataCheck, StoredCheckpoint, check_no_adapter
from gemq.checkpoint.verification import verify_packed, verify_unpacked
from gemq.errors import UserError, short_repr
from gemq.kernels.modules import PackedLinear, PackedMatrices, make_packed
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.models.auto_class import auto_class
from gemq.models.experts_adapter import adopt_experts
from gemq.models.size_limits import bounded_construction
from gemq.quant.stored_matrix import StoredMatrix, stored_matrix
from gemq.quant.widths import AnyWidth, group_size_for
from gemq.runtime.compat import transformers_private
from gemq.runtime.safetensors_files import TensorSpec, is_file, read_json, stored_tensors
from gemq.runtime.weights_notice import WEIGHTS_KEY, is_notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.py"]


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    gpu_memory: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load the model of a packed checkpoint.

    Args:
        path: a directory that gemq wrote, or the hub id of one
        device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` for the GPU if there is one
        dtype: type of activations and unquantized weights, such as ``float32``; ``auto`` takes the checkpoint's
        gpu_memory: upper bound of GPU memory in bytes, or a text such as ``8GB``. Experts without room there stay in
            host memory, and the GPU reads those that the router chooses. Such a model cannot be trained
        context: tokens of prompt and answer that are to fit into ``gpu_memory``; 8192 by default, or the model's
            maximum if that is less
        batch: texts at the same time that are to fit into ``gpu_memory``; 1 by default
        kwargs: passed to ``from_pretrained`` (``revision``, ``device_map``, ``trust_remote_code`` ...)

    Returns:
        The model of Transformers, in eval mode. Its packed weights stay packed.

    Raises:
        UserError: it is not a gemq checkpoint, or something is missing or damaged. Checksums are verified. Or
            ``gpu_memory`` is too small.
    """
    register()
    device = str(device) if isinstance(device, torch.device) else device
    _check_arguments(path, device, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use device='cpu'")
    if gpu_memory is None and (context is not None or batch is not None):
        raise UserError("context and batch say what is to fit into gpu_memory: give gpu_memory too, or leave them out")
    bound = None if gpu_memory is None else memory_bound(gpu_memory, torch.device(device))
    if bound is not None and "device_map" in kwargs:
        raise UserError("gpu_memory is for one GPU: give device='cuda' without device_map")
    directory = local_directory(path, kwargs) / kwargs.get("subfolder", "")
    stored = StoredCheckpoint.open(directory)
    kwargs = {
        "trust_remote_code": False,
        "device_map": device if bound is None else "cpu",
        **kwargs,
        "use_safetensors": True,
        "dtype": dtype,
    }
    config = read_config(directory, trust_remote_code=kwargs["trust_remote_code"])
    with user_errors(directory, "load"), bounded_construction(directory, stored.size):
        loaded: Any = auto_class(config).from_pretrained(path, **kwargs, output_loading_info=True)
    model, report = loaded
    missing = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing or have the wrong shape, first: {missing[0]}: "
            "copy the checkpoint again"
        )
    model.config.return_dict = True  # gemq reads outputs by name
    if bound is not None:
        modules: Any = [model.get_submodule(path) for path in stored.format.experts]
        skeleton = build_skeleton(config, stored, trust_remote_code=kwargs["trust_remote_code"])
        target = torch.device(device)
        model.gemq_residency = fit_into(model, skeleton, directory, modules, bound, context, batch or 1, target)
    return model.eval()


def _check_arguments(path: object, device: object, dtype: object) -> None:
    """Raises UserError for invalid arguments of ``load``."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{short_repr(path)} is no path: give the directory of a checkpoint, or its hub id")
    dtype_names = ["auto"]
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype) and value.is_floating_point:
            dtype_names.append(name)
    if not isinstance(dtype, torch.dtype) and dtype not in dtype_names:
        raise UserError(f"dtype cannot be {short_repr(dtype)}: give auto, float32, bfloat16 or float16")
    is_device = isinstance(device, str)
    try:
        if device != "auto":
            torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        is_device = False
    if not is_device:
        raise UserError(f"there is no device {short_repr(device)}: give auto, cpu or cuda")


def local_directory(path: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """Returns the directory of a checkpoint. One on the hub is downloaded to the cache first.

    Args:
        path: a local directory or a hub id
        kwargs: of ``from_pretrained``; those that select a revision or a cache are used

    Raises:
        UserError: there is no such directory or model.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    try:
        return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES, **hub_arguments))
    except (OSError, ValueError) as error:  # base classes of all errors of the hub that may occur here
        raise UserError(f"{path} is neither a directory nor a model on the hub that can be reached") from error


class GemqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint in the form that Transformers uses."""

    def __init__(self, **values: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.packed_format = PackedFormat.from_dict({"quant_method": QUANT_METHOD, **values})
        self._about = {key: values[key] for key in ABOUT_KEYS if key in values}

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for config.json."""
        return {**self.packed_format.to_dict(), **self._about}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class GemqQuantizer(HfQuantizer):
    """Prepares an empty model for packed tensors, and packs its experts contiguously after they are loaded."""

    quantization_config: GemqConfig

    def __init__(self, quantization_config: GemqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UserError("gemq does not quantize while loading: run gemq quantize, then load its output")
        self._format = quantization_config.packed_format
        # Set when the empty model is known.
        self._dtype = torch.float32  # of the model
        self._dtypes: dict[str, torch.dtype] = {}  # of each floating-point parameter
        self._shapes: dict[str, tuple[int, int]] = {}  # of each packed matrix kind
        self._data_check: BackgroundDataCheck | None = None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works on the loaded model."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called by ``save_pretrained``, which writes a config.json without checksums."""
        if not transformers_private.has_adapter(model):  # with an adapter, only the adapter is saved
            logging.getLogger("gemq").warning(
                "save_pretrained writes no checksums: inspect --verify needs gemq's own files"
            )
        return super().get_state_dict_and_metadata(model)

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained. Gradients pass through packed weights, which do not change."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Removes the notice for programs without gemq, before Transformers looks for the weights."""
        if is_notice(getattr(config, WEIGHTS_KEY, None)):
            delattr(config, WEIGHTS_KEY)
        return config

    update_tp_plan = update_attn_implementation  # of the two methods, Transformers 5.17 calls only this one

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Records the dtype, which Transformers does not pass to ``_process_model_before_weight_loading``."""
        self._dtype = dtype
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Verifies the files and replaces packed modules by placeholders."""
        packed = self._format
        stored = _stored_checkpoint(checkpoint_files, packed)
        remove_checksums(model.config)
        adopt_experts(model)
        self._dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        self._shapes = matrix_shapes(model, packed)
        expected = packed.expected(self._shapes)
        names = stored_names(model, expected, stored.tensors)
        specs = {name: stored.tensors[stored_name].spec for name, stored_name in names.items()}
        verify_packed(expected, specs)
        if type(model).__name__ in (model.config.architectures or ()):  # other classes may have other heads
            verify_unpacked(unpacked_tensors(model, packed), expected, specs)
        stored.check_config()
        self._data_check = BackgroundDataCheck(stored)
        for path, projections in packed.experts.items():
            _add_placeholders(model.get_submodule(path), path, projections, expected)
        for path, width in packed.linears.items():
            rows, columns = self._shapes[path]
            group_size = group_size_for(columns, packed.group_size)
            bias = cast(nn.Linear, model.get_submodule(path)).bias
            linear = PackedLinear(rows, columns, width, group_size, bias, device="meta")
            transformers_private.mark_initialized(linear)
            model.set_submodule(path, linear)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Packs experts contiguously, corrects dtypes, and waits for the checksums."""
        state_bits = self._format.state_bits
        make_matrices: Any = TrellisMatrices if state_bits else PackedMatrices
        for path, projections in self._format.experts.items():
            experts = model.get_submodule(path)
            for projection, widths in projections.items():
                matrices = []
                for expert, width in enumerate(widths):
                    matrices.append(_pop_placeholder(experts, expert, projection, width, state_bits))
                setattr(experts, projection, make_matrices(matrices))
        self._correct_dtypes(model)
        if self._data_check is not None:
            self._data_check.result()
        self._data_check = None

    def _correct_dtypes(self, model: PreTrainedModel) -> None:
        """Casts renamed tensors, which Transformers 5.17 leaves in the dtype of the file."""
        float32_plan = transformers_private.dtype_plan(model, self._dtype)
        float32_pattern = transformers_private.compile_globs(float32_plan)[0] if float32_plan else None
        for name, parameter in model.named_parameters():
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype and not (float32_pattern and float32_pattern.search(name)):
                parameter.data = parameter.data.to(dtype)


class _Placeholder(nn.Module):
    """Empty buffers of one packed matrix on the meta device, which Transformers fills by name.

    Args:
        specs: dtype and shape by suffix
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        super().__init__()
        for suffix, spec in specs.items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=torch.uint8, device="meta"))


def _add_placeholders(
    experts: nn.Module,
    path: str,
    projections: ProjectionWidths,
    expected: Mapping[str, TensorSpec],
) -> None:
    """Replaces the parameters of an experts module by placeholders for each expert's packed matrices.

    Args:
        experts: the module
        path: of the module
        projections: names of its matrices, and the width of each expert
        expected: all packed tensors
    """
    make_packed(experts, list(projections))
    # The family's initialization of the experts module or of its parent accesses the 3-D parameters.
    transformers_private.mark_initialized(experts)
    for projection in projections:
        empty = torch.empty(0)
        transformers_private.mark_initialized(empty)
        vars(experts)[projection] = empty  # an attribute, not a parameter, until the packed matrices replace it
    for expert in range(len(projections["down_proj"])):
        module = nn.Module()
        for projection in projections:
            name = f"{path}.{expert}.{projection}"
            specs = {field: expected[f"{name}.{field}"] for field in fields_of(projections[projection][expert])}
            module.add_module(projection, _Placeholder(specs))
        experts.add_module(str(expert), module)


def _pop_placeholder(
    experts: nn.Module, expert: int, projection: str, width: AnyWidth, state_bits: int
) -> StoredMatrix:
    """Removes the placeholder of one expert's matrix. Returns the loaded matrix."""
    module = experts.get_submodule(str(expert))
    placeholder = module.get_submodule(projection)
    delattr(module, projection)
    if next(module.children(), None) is None:
        delattr(experts, str(expert))
    tensors = {f"{projection}.{field}": tensor for field, tensor in placeholder.named_buffers()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise UserError("packed experts cannot be offloaded: load without offload_buffers, or on device='cpu'")
    return stored_matrix(tensors, projection, width, state_bits)


def _stored_checkpoint(files: Sequence[str] | None, packed_format: PackedFormat) -> StoredCheckpoint:
    """Opens the checkpoint that Transformers is about to read. Raises UserError if files are pickled or damaged."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise UserError("a gemq checkpoint is loaded from its safetensors files: give from_pretrained its directory")
    directory = Path(files[0]).parent
    if len(files) > 1:  # files may be in subdirectories
        directory = Path(os.path.commonpath([Path(file).parent for file in files]))
    for candidate in (directory, *directory.parents[:2]):
        if is_file(candidate / "config.json"):
            directory = candidate
            break
    check_no_adapter(directory)
    config = read_json(directory / "config.json") if is_file(directory / "config.json") else {}
    return StoredCheckpoint(directory, config, packed_format, stored_tensors(map(Path, files)))


def register() -> None:
    """Registers gemq checkpoints with Transformers. Further calls have no effect."""
    transformers_private.register_quantizer(QUANT_METHOD, GemqConfig, GemqQuantizer)


register()
