"""A model's files: a local directory or a hub id, its fingerprint, and loading it.

Every failure that the user can fix raises a UserError. Must not import pipeline stages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from gemq.errors import UserError
from gemq.models.auto_class import auto_class
from gemq.models.config_checks import read_configuration, suspicious_fields
from gemq.models.experts import use_experts_forward
from gemq.models.experts_adapter import adopt_experts
from gemq.models.file_hashes import file_digests
from gemq.models.fused_norms import use_fused_kernels
from gemq.models.hub import download_model
from gemq.models.library_errors import one_line_errors
from gemq.models.reader import LayerReader, ReadOptions, loading_from
from gemq.models.size_limits import bounded_construction, check_source_sizes
from gemq.models.stored_checks import FLOATS
from gemq.models.structure import find_structure
from gemq.runtime.compat import torch_private, transformers_private
from gemq.runtime.safetensors_files import read_header, weight_files
from gemq.runtime.upload import TORCH_DTYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DEFAULT_SEQ_LEN = 2048
"""Tokens per window, where neither the user nor the model's configuration limits them."""

ADAPTER_FILE = "adapter_config.json"

READABLE_QUANTIZATIONS = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantizations of originals that are published in no better precision. Transformers dequantizes them on loading."""


@dataclass(frozen=True)
class Source:
    """A model's files on the local disk.

    Attributes:
        path: directory of the files
        trust_remote_code: whether code that the model brings may run
        left_out: names of stored matrices that the loaded model has no place for, such as multi-token prediction layers
    """

    path: Path
    trust_remote_code: bool = False
    left_out: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def resolve(
        cls, model: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
    ) -> Source:
        """Finds a model's files. Those of a hub id are downloaded or found in the cache, without pickled weights.

        Args:
            model: local directory or hub id
            revision: branch, tag or commit of a hub id
            trust_remote_code: whether code that the model brings may run
            weights: False downloads only the files that describe the model

        Raises:
            UserError: there is no such model
        """
        path = Path(os.path.expanduser(model))
        if not os.path.exists(path):  # False for what cannot be a path, such as a name that is too long
            if model.startswith((".", "/", "~")) or model.count("/") != 1:
                raise UserError(f"model {model[:200]} does not exist: give a directory or a hub id such as org/name")
            return cls(download_model(model, revision, weights), trust_remote_code)
        if not (path / "config.json").is_file():
            raise UserError(f"{model} holds no config.json: give the directory of a Transformers checkpoint")
        if revision is not None:
            raise UserError(f"--revision goes with a hub id, and {model} is a local directory: leave it out")
        return cls(path, trust_remote_code)

    def config(self) -> Any:
        """Reads the model's configuration, as if it were stored in full precision.

        Raises:
            UserError: the configuration is unreadable, or the model is quantized in a way that cannot be read
        """
        config = self.stored_config()
        method = _quantization_method(config)
        if method is not None:
            if method not in READABLE_QUANTIZATIONS:
                raise UserError(f"{self.path} is quantized already ({method}): give the full-precision model")
            _delete_quantization(config)
        return config

    def stored_config(self) -> Any:
        """Reads the configuration as it is stored. Packed checkpoints are supported.

        Raises:
            UserError: it is unreadable
        """
        read_configuration(self.path / "config.json")
        check_source_sizes(self.path)
        problem = f"cannot read the configuration of {self.path}"
        try:
            with one_line_errors(problem, "correct its config.json, or copy the model again"):
                config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
                config.get_text_config()
        except UserError as error:
            reason = str(error.__cause__)
            if "trust_remote_code" in reason:
                raise UserError(
                    f"{self.path} brings its own code: read it, then allow it with --trust-remote-code"
                ) from error
            if unknown := re.search(r"model type `(.*?)` but Transformers", reason):
                raise UserError(
                    f"{self.path} is of type {unknown.group(1)!r}, which Transformers {transformers.__version__} does "
                    "not know: upgrade Transformers, or allow code that the model brings with --trust-remote-code"
                ) from error
            raise
        config.return_dict = True  # outputs are read by name
        return config

    def skeleton(self) -> PreTrainedModel:
        """Builds the model on the meta device: shapes without weights."""
        config = self.config()
        with torch.device("meta"), self._building():
            model = auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code)
        adopt_experts(model)
        return model

    def advice(self) -> str:
        """Returns advice for a model that cannot be built or run: fields of config.json with unusual values."""
        fields: list[str] = []
        with suppress(Exception):  # a family whose configuration has no defaults
            defaults = type(self.stored_config())().to_dict()
            fields = suspicious_fields(read_configuration(self.path / "config.json"), defaults)
        first_step = f"look at {', '.join(fields[:3])} in" if fields else "correct"
        return f"{first_step} its config.json, or copy the model again"

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Turns whatever Transformers raises while it builds or fills the model into a UserError of one line."""
        problem = f"cannot load {self.path} as a causal language model"
        try:
            with one_line_errors(problem, self.advice), bounded_construction(self.path):
                yield
        except UserError as error:
            if "Unrecognized configuration class" in str(error):
                raise UserError(
                    f"{self.path} is of a type that Transformers does not know as a model that predicts each token "
                    "from those before it: gemq quantizes no encoders and no encoder-decoders"
                ) from error
            raise

    def load(self, device: torch.device, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
        """Loads the complete model.

        Args:
            device: where to load it
            dtype: of all floating-point parameters; None leaves them in the types that Transformers gives them

        Returns:
            The model, and the type in which each parameter is stored.
        """
        model, reader = self._read(self.skeleton(), (), dtype)
        stored_types = {name: reader.types[name] for name, _ in model.named_parameters()}
        return self._prepare(model, device, dtype), stored_types

    def open(self, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerReader]:
        """Loads the model without its decoder layers, which stay on the meta device.

        Args:
            device: where to load it
            dtype: of all floating-point parameters

        Returns:
            The model, and the reader of its layers.

        Raises:
            UserError: the model's structure is not understood
        """
        skeleton = self.skeleton()
        paths = [layer.path for layer in find_structure(skeleton).layers]
        model, reader = self._read(skeleton, paths, dtype)
        return self._prepare(model, device, dtype), reader

    def _read(
        self, skeleton: PreTrainedModel, layers: Sequence[str], dtype: torch.dtype | None
    ) -> tuple[PreTrainedModel, LayerReader]:
        """Lets Transformers load the model, but only from ``weight_files`` and without ``layers``.

        Transformers receives no directory. There it would also look for pickled weights and for adapters.

        Args:
            skeleton: the model without weights
            layers: paths of the layers that stay on the meta device
            dtype: compute type, see ``ReadOptions``

        Returns:
            The model, and the reader of its layers.

        Raises:
            UserError: the model cannot be loaded, or Transformers would initialize tensors that the files lack
        """
        config = self._load_config(skeleton)
        method = _quantization_method(config)
        quantization: dict[str, Any] = {}
        if method is not None:
            quantization["quantization_config"] = READABLE_QUANTIZATIONS[method](dequantize=True)
        files = weight_files(self.path)
        if (self.path / ADAPTER_FILE).exists():
            warnings.warn(
                f"the adapter in {self.path} ({ADAPTER_FILE}) is not applied: only the whole model next to it is read",
                stacklevel=3,
            )
        with loading_from(files, ReadOptions(str(self.path), layers, dtype)) as readers, self._building():
            loaded: Any = type(skeleton).from_pretrained(
                None,
                config=config,
                dtype=getattr(config, "dtype", None) or _first_float_type(files),
                state_dict={},
                output_loading_info=True,
                **quantization,
            )
        model, report = loaded
        if quantization:
            _forget_quantization(model)
        self.left_out[:] = readers[0].left_out
        missing = sorted(map(str, report["missing_keys"]))
        if missing:  # Transformers would initialize them
            raise UserError(
                f"{self.path} lacks {len(missing)} of the model's tensors, first: {missing[0]}: copy the checkpoint "
                "again"
            )
        model.config.name_or_path = model.name_or_path = str(self.path)
        if model.can_generate():
            model.generation_config = self._generation_config()
        return model, readers[0]

    def _load_config(self, skeleton: PreTrainedModel) -> Any:
        """Returns the stored configuration of the part of the model that is loaded."""
        config = self.stored_config()
        if type(config) is type(skeleton.config):
            return config
        # the text part of a multimodal model
        quantization = getattr(config, "quantization_config", None)
        text_config = config.get_text_config()
        if quantization is not None:
            text_config.quantization_config = quantization
        return text_config

    @staticmethod
    def _prepare(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        """Adopts experts, moves all loaded tensors to ``device`` and converts parameters to ``dtype``.

        On a GPU it also fuses the kernels of norms and rotary positions, where the result is the same.
        """
        adopt_experts(model)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if not parameter.is_meta:
                    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                    parameter.data = parameter.data.to(device, kind)
            # buffers are not converted: rotary frequencies stay in float32
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                if not buffer.is_meta:
                    torch_private.tensor_dict(module, name)[name] = buffer.to(device)
        use_experts_forward(model)
        if device.type == "cuda":
            use_fused_kernels(model, device)
        return model.eval()

    def check_weights(self) -> None:
        """Reads the headers of the weights.

        Raises:
            UserError: files are missing, pickled or truncated
        """
        for file in weight_files(self.path):
            read_header(file)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            UserError: it is missing, unreadable, or that of another model
        """
        advice = "copy the tokenizer files again, or install what they need"
        with one_line_errors(f"cannot read the tokenizer of {self.path}", advice):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
            num_tokens, num_special = len(tokenizer.get_vocab()), len(set(tokenizer.all_special_ids))
            size = tokenizer.vocab_size  # without added tokens, which may have no embedding
            tokenizer.decode(tokenizer("a b")["input_ids"])  # some damage shows only in use
        if num_tokens <= num_special:  # Transformers created an empty tokenizer
            raise UserError(f"{self.path} holds no tokenizer: copy its tokenizer files there")
        embeddings = getattr(self.stored_config().get_text_config(), "vocab_size", None)
        if isinstance(embeddings, int) and size > embeddings:
            raise UserError(
                f"the tokenizer of {self.path} has {size} tokens and the model has embeddings for {embeddings} "
                "(vocab_size): copy the tokenizer that belongs to the model"
            )
        return tokenizer

    def _generation_config(self) -> GenerationConfig:
        """Reads the defaults of generation from generation_config.json, or else from config.json."""
        with one_line_errors(f"cannot read the generation_config.json of {self.path}", "correct or delete it"):
            if (self.path / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(self.path)
            return transformers_private.generation_config_of_model(self.path)

    def fingerprint(self, previous: Mapping[str, Sequence[Any]] | None = None) -> tuple[str, dict[str, list[Any]]]:
        """Hashes the configuration, the tokenizer and every byte of the weights.

        Args:
            previous: an earlier second result. Files with the same size and time are not read again.

        Returns:
            The fingerprint, and size, time of the last change in nanoseconds, and SHA-256 of each file.
        """
        files = file_digests(self.path, previous)
        digests = {name: record[2] for name, record in files.items()}
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16], files


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the compute type that a recipe's ``dtype`` selects on ``device``."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def configured_types(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Returns the type in which each parameter is stored according to the configuration, which has one for all."""
    dtype = getattr(model.config.get_text_config(), "dtype", None) or torch.bfloat16
    return {name: dtype for name, _ in model.named_parameters()}


def max_seq_len(config: Any) -> int:
    """Returns the length of the longest window that the model supports, in tokens."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_SEQ_LEN)


def calibration_seq_len(config: Any, seq_len: int | None) -> int:
    """Returns the tokens per calibration window: ``seq_len``, by default 2048 or what the model supports.

    Raises:
        UserError: ``seq_len`` is longer than the model supports
    """
    longest = max_seq_len(config)
    if seq_len is not None and seq_len > longest:
        raise UserError(f"--seq-len {seq_len} is longer than the model takes: give at most {longest}")
    return min(DEFAULT_SEQ_LEN, longest) if seq_len is None else seq_len


def _quantization_method(config: Any) -> str | None:
    """Returns the name of a stored model's quantization; None if it is not quantized."""
    for section in (config, config.get_text_config()):
        quantization = getattr(section, "quantization_config", None)
        if quantization is None:
            continue
        is_dict = isinstance(quantization, dict)
        method = quantization.get("quant_method") if is_dict else getattr(quantization, "quant_method", None)
        return str(getattr(method, "value", method or "unknown"))
    return None


def _delete_quantization(config: Any) -> None:
    """Removes the description of a quantization from a configuration and from its text part."""
    for section in (config, config.get_text_config()):
        if hasattr(section, "quantization_config"):
            del section.quantization_config


def _forget_quantization(model: Any) -> None:
    """Makes a dequantized model an ordinary one, so that it is not quantized again when it is saved."""
    _delete_quantization(model.config)
    transformers_private.forget_quantizer(model)


def _first_float_type(files: Sequence[Path]) -> torch.dtype:
    """Returns the type of the first stored floats. Transformers uses it if a configuration names no type."""
    for file in files:
        for spec in read_header(file).values():
            kind = TORCH_DTYPES.get(spec.dtype)
            if kind in FLOATS:
                return kind
    return torch.float32
