"""A packed checkpoint's configuration, and its model on the meta device: shapes and names without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from gemq.checkpoint import checksums
from gemq.errors import UserError
from gemq.models.auto_class import auto_class
from gemq.models.experts_adapter import adopt_experts
from gemq.models.size_limits import bounded_construction

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemq.checkpoint.stored import StoredCheckpoint


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' configuration of a packed checkpoint. Raises UserError when Transformers refuses it."""
    with user_errors(directory, "read the configuration of"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        forget_checksums(config)
        return config


def build_skeleton(config: Any, stored: StoredCheckpoint, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The full-precision model on the meta device.

    Raises:
        UserError: Transformers cannot build it, or it grows beyond the weights of the checkpoint.
    """
    bounded = bounded_construction(stored.directory, stored.size)
    with user_errors(stored.directory, "build the model of"), torch.device("meta"), bounded:
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        adopt_experts(model)
    return model


def forget_checksums(config: Any) -> None:
    """Takes gemq's checksums out of a Transformers configuration: they would be saved again beside other weights."""
    vars(config).pop(checksums.KEY, None)


@contextmanager
def user_errors(directory: Path, doing: str) -> Iterator[None]:
    """Turns whatever Transformers raises over a damaged checkpoint into one line.

    Its families' code raises anything for odd numbers in config.json (division by zero, missing keys, failed assertions
    ...), so that no list of exceptions is complete. Out of memory is no fault of the files and stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{directory} brings its own code: read it, then allow it with --trust-remote-code "
                "(trust_remote_code=True)"
            ) from error
        raise UserError(
            f"cannot {doing} {directory} ({describe(error)}): if its files were damaged or edited, copy them again"
        ) from error


def describe(error: Exception) -> str:
    """An exception in a few words: its type and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}" if text else type(error).__name__
