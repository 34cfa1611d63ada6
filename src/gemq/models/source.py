"""Where a model comes from: a local directory or a hub id, its fingerprint, and loading it.

Every way in which that can fail for a reason the user can mend ends in a UserError. Knows no experts and no stages.
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
from gemq.models.calls import one_line_errors, summary
from gemq.models.configuration import read_configuration, suspicious_fields
from gemq.models.experts import use_experts_forward
from gemq.models.experts_adapter import adopt_experts
from gemq.models.file_hashes import file_digests
from gemq.models.fused_norms import use_fused_kernels
from gemq.models.reader import LayerReader, Reading, reading_from
from gemq.models.size_limits import bounded_construction, check_source_sizes
from gemq.models.stored import FLOATS
from gemq.models.structure import find_structure
from gemq.runtime.safetensors_files import read_header, weight_files
from gemq.runtime.upload import TYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_WINDOW = 2048
ADAPTER = "adapter_config.json"
READ_QUANTIZED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantized originals that are read: published in no better precision, and Transformers dequantizes them on loading."""


@dataclass(frozen=True)
class Source:
    """A model's files on the local disk."""

    path: Path
    trust_remote_code: bool = False
    left_out: list[str] = field(default_factory=list, compare=False)
    """Names of stored matrices that ``load`` found no place for in the model, such as multi-token prediction layers."""

    @classmethod
    def resolve(
        cls, model: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
    ) -> Source:
        """A local directory as it is; a hub id is downloaded (or found in the cache), no pickled weights.

        weights: False leaves the weights on the hub and fetches only what describes the model
        """
        path = Path(os.path.expanduser(model))
        if not os.path.exists(path):  # False for what cannot be a path, such as a name that is too long
            if model.startswith((".", "/", "~")) or model.count("/") != 1:
                raise UserError(f"model {model[:200]} does not exist: give a directory or a hub id such as org/name")
            return cls(_download(model, revision, weights), trust_remote_code)
        if not (path / "config.json").is_file():
            raise UserError(f"{model} holds no config.json: give the directory of a Transformers checkpoint")
        if revision is not None:
            raise UserError(f"--revision goes with a hub id, and {model} is a local directory: leave it out")
        return cls(path, trust_remote_code)

    def config(self) -> Any:
        """The model's configuration, as if it were stored in full precision.

        Raises UserError when it is unreadable, or quantized in a way that cannot be read.
        """
        config = self._stored_config()
        if (method := _quantization(config)) is not None:
            if method not in READ_QUANTIZED:
                raise UserError(f"{self.path} is quantized already ({method}): give the full-precision model")
            for part in (config, config.get_text_config()):
                if hasattr(part, "quantization_config"):
                    del part.quantization_config
        return config

    def stored_config(self) -> Any:
        """The configuration as it is stored, of packed checkpoints too. Raises UserError when it is unreadable."""
        return self._stored_config()

    def _stored_config(self) -> Any:
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
        """The model on the meta device: shapes without weights."""
        config = self.config()
        with torch.device("meta"), self._building():
            model = auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code)
        adopt_experts(model)
        return model

    def advice(self) -> str:
        """What to do about a model that cannot be built or run: names fields of config.json with unusual values."""
        fields: list[str] = []
        with suppress(Exception):  # a family whose configuration has no defaults
            defaults = type(self._stored_config())().to_dict()
            fields = suspicious_fields(read_configuration(self.path / "config.json"), defaults)
        look_at = f"look at {', '.join(fields[:3])} in" if fields else "correct"
        return f"{look_at} its config.json, or copy the model again"

    @contextmanager
    def _building(self) -> Iterator[None]:
        """While Transformers builds or fills the model: whatever it raises is one line."""
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
        """The whole model.

        Args:
            device: where to.
            dtype: of all floating-point parameters; None leaves them in the types that Transformers gives them.

        Returns:
            The model, and the type in which each parameter is stored.
        """
        model, reader = self._read(self.skeleton(), (), dtype)
        stored = {name: reader.types[name] for name, _ in model.named_parameters()}
        return self._ready(model, device, dtype), stored

    def open(self, device: torch.device, dtype: torch.dtype) -> tuple[PreTrainedModel, LayerReader]:
        """The model without its decoder layers, which stay on the meta device, and the reader that has them.

        Raises UserError for a model whose structure is not understood.
        """
        skeleton = self.skeleton()
        paths = [layer.path for layer in find_structure(skeleton).layers]
        model, reader = self._read(skeleton, paths, dtype)
        return self._ready(model, device, dtype), reader

    def _read(
        self, skeleton: PreTrainedModel, layers: Sequence[str], dtype: torch.dtype | None
    ) -> tuple[PreTrainedModel, LayerReader]:
        """The model as Transformers loads it, but from ``weight_files`` alone and without ``layers``.

        Transformers is given no directory: there it would also look for pickled weights and for adapters.

        Raises:
            UserError: the model cannot be loaded, or Transformers would make something up.
        """
        config = self._stored_config()
        method = _quantization(config)
        quantization = getattr(config, "quantization_config", None)
        if type(config) is not type(skeleton.config):  # the text part of a model that also sees or hears
            config = config.get_text_config()
            if quantization is not None:
                config.quantization_config = quantization
        options = {} if method is None else {"quantization_config": READ_QUANTIZED[method](dequantize=True)}
        files = weight_files(self.path)
        if (self.path / ADAPTER).exists():
            warnings.warn(
                f"the adapter in {self.path} ({ADAPTER}) is not applied: only the whole model beside it is read",
                stacklevel=3,
            )
        with reading_from(files, Reading(str(self.path), layers, dtype)) as readers, self._building():
            loaded: Any = type(skeleton).from_pretrained(
                None,
                config=config,
                dtype=getattr(config, "dtype", None) or _first_type(files),
                state_dict={},
                output_loading_info=True,
                **options,
            )
        model, report = loaded
        if options:
            _forget_quantization(model)
        self.left_out[:] = readers[0].left_out
        if absent := sorted(map(str, report["missing_keys"])):  # Transformers would make them up
            raise UserError(
                f"{self.path} lacks {len(absent)} of the model's tensors, first: {absent[0]}: copy the checkpoint again"
            )
        model.config.name_or_path = model.name_or_path = str(self.path)
        if model.can_generate():
            model.generation_config = self.generation_config()
        return model, readers[0]

    @staticmethod
    def _ready(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
        """Adopts experts, moves everything that has contents to ``device`` and parameters to ``dtype``.

        On a GPU norms and rotary positions are few kernels, where these compute the same.
        """
        adopt_experts(model)
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.is_meta:
                    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                    parameter.data = parameter.data.to(device, kind)
            for name, buffer in module._buffers.items():  # not cast: rotary frequencies stay in float32
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        use_experts_forward(model)
        if device.type == "cuda":
            use_fused_kernels(model, device)
        return model.eval()

    def check_weights(self) -> None:
        """Reads the headers of the weights. Raises UserError when files are missing, pickled or cut short."""
        for file in weight_files(self.path):
            read_header(file)

    @cached_property
    def tokenizer(self) -> Any:
        """Raises UserError when there is none, none that can be read, or one of another model."""
        advice = "copy the tokenizer files again, or install what they need"
        with one_line_errors(f"cannot read the tokenizer of {self.path}", advice):
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
            known, special = len(tokenizer.get_vocab()), len(set(tokenizer.all_special_ids))
            size = tokenizer.vocab_size  # without added tokens, which may lie behind the embedding
            tokenizer.decode(tokenizer("a b")["input_ids"])  # some damage shows only in use
        if known <= special:  # Transformers made an empty one
            raise UserError(f"{self.path} holds no tokenizer: copy its tokenizer files there")
        rows = getattr(self._stored_config().get_text_config(), "vocab_size", None)
        if isinstance(rows, int) and size > rows:
            raise UserError(
                f"the tokenizer of {self.path} has {size} tokens and the model has embeddings for {rows} (vocab_size): "
                "copy the tokenizer that belongs to the model"
            )
        return tokenizer

    def generation_config(self) -> GenerationConfig:
        """How the model generates, by its generation_config.json or else by its config.json."""
        options: dict[str, Any] = {}
        if not (self.path / "generation_config.json").is_file():
            options = {"config_file_name": "config.json", "_from_model_config": True}
        with one_line_errors(f"cannot read the generation_config.json of {self.path}", "correct or delete it"):
            return GenerationConfig.from_pretrained(self.path, **options)

    def fingerprint(self, known: Mapping[str, Sequence[Any]] | None = None) -> tuple[str, dict[str, list[Any]]]:
        """SHA-256 over the configuration, the tokenizer and every byte of the weights; and for each file its size, the
        nanosecond of its last change and its digest.

        known: what this gave before: a file of the same size and time is not read again
        """
        files = file_digests(self.path, known)
        whole = {name: values[2] for name, values in files.items()}
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16], files


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type that a recipe's ``dtype`` means on ``device``."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[name]


def configured_types(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The type in which each parameter is stored, as far as the configuration tells: it names one for all."""
    dtype = getattr(model.config.get_text_config(), "dtype", None) or torch.bfloat16
    return {name: dtype for name, _ in model.named_parameters()}


def longest_window(config: Any) -> int:
    """Most tokens that the model takes at once."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_WINDOW)


def calibration_window(config: Any, wanted: int | None) -> int:
    """Tokens per calibration window: those wanted, by default 2048 or the longest that the model takes."""
    longest = longest_window(config)
    if wanted is not None and wanted > longest:
        raise UserError(f"--window {wanted} is longer than the model takes: give at most {longest}")
    return min(DEFAULT_WINDOW, longest) if wanted is None else wanted


def _quantization(config: Any) -> str | None:
    """How a stored model is quantized, None if it is not."""
    for part in (config, config.get_text_config()):
        if (found := getattr(part, "quantization_config", None)) is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            return str(getattr(method, "value", method or "unknown"))
    return None


def _forget_quantization(model: Any) -> None:
    """What was dequantized on loading is an ordinary model: nothing of it shall be quantized again when it is saved."""
    for part in (model.config, model.config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    model.hf_quantizer = None
    model._weight_conversions = None  # they began with dequantizing; saving uses the family's own


def _first_type(files: Sequence[Path]) -> torch.dtype:
    """The type of the first stored floats: what Transformers takes where a configuration names no type."""
    kinds = (TYPES.get(spec.dtype) for file in files for spec in read_header(file).values())
    return next((kind for kind in kinds if kind in FLOATS), torch.float32)


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [
            "*.json",
            "*.txt",
            "*.model",
            "*.jinja",
            "*.py",
            "*.tiktoken",
            *(["*.safetensors"] if weights else []),
        ]
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*"])
        )
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {model} is no local directory and cannot be had from the hub: check the name and the network"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model {model} is no local directory and the hub refuses it ({summary(error)}): check the name"
        ) from error
