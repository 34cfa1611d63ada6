"""The configuration of a packed checkpoint, and its model on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from gemq.checkpoint.format import CONFIG_KEY
from gemq.errors import UserError
from gemq.models.auto_class import auto_class
from gemq.models.experts_adapter import adopt_experts
from gemq.models.size_limits import bounded_construction
from gemq.runtime.fallbacks import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemq.checkpoint.stored import StoredCheckpoint


def read_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Reads the Transformers configuration of a packed checkpoint. Raises UserError if Transformers refuses it."""
    with user_errors(directory, "read the configuration of"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        remove_checksums(config)
        return config


def build_skeleton(config: Any, stored: StoredCheckpoint, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds the full-precision model on the meta device.

    Raises:
        UserError: Transformers cannot build it, or it is larger than the weights of the checkpoint allow.
    """
    bounded = bounded_construction(stored.directory, stored.size)
    with user_errors(stored.directory, "build the model of"), torch.device("meta"), bounded:
        model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        adopt_experts(model)
    return model


def remove_checksums(config: Any) -> None:
    """Removes gemq's checksums from a Transformers configuration, which may be saved with other weights later."""
    vars(config).pop(CONFIG_KEY, None)


@contextmanager
def user_errors(directory: Path, action: str) -> Iterator[None]:
    """Turns exceptions of Transformers on a damaged checkpoint into one-line UserErrors.

    Model code raises arbitrary exceptions for invalid numbers in config.json (division by zero, missing keys, failed
    assertions), so that no list of them is complete. Out-of-memory errors are not the fault of the files and pass.

    Args:
        action: verb phrase for the message, such as ``load``
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
            f"cannot {action} {directory} ({first_line(error)}): if its files were damaged or edited, copy them again"
        ) from error
