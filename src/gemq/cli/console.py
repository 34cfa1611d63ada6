"""Output to the terminal and to JSON files. Must import torch only inside functions, as all of the command line."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemq.errors import UserError
from gemq.runtime.display import SafeConsole

if TYPE_CHECKING:
    from gemq.runtime.progress import Monitor


UNBOUNDED_WIDTH = 10_000
"""Width of a console that is a pipe or a file, in characters."""

PLAIN = {"·": ".", "±": "+-", "…": "...", "│": "|", "─": "-", "━": "-"}
"""Replacements of characters that an encoding lacks."""


def make_monitor(quiet: bool) -> Monitor:
    """Return a monitor that shows progress on stderr, unless ``quiet``."""
    from gemq.runtime.progress import Monitor

    quiet_libraries()
    return Monitor(None if quiet else SafeConsole(stderr=True, highlight=False))


def quiet_libraries() -> None:
    """Silence progress bars and warnings of Transformers and the hub, which would interrupt those of gemq."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    # addressed to developers: names that Transformers will change
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated")


class _Console(SafeConsole):
    """A console that leaves broken pipes to the command line, where rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        """Raise an error that ``gemq.cli.run`` handles."""
        raise BrokenPipeError


def make_console() -> SafeConsole:
    """Return a console on stdout."""
    console = _Console(highlight=False)
    if not console.is_terminal:  # lines and tables are not wrapped
        console.soft_wrap = True
        if "COLUMNS" not in os.environ:
            console.width = UNBOUNDED_WIDTH
    return console


def use_any_encoding() -> None:
    """Let stdout replace characters that its encoding lacks, such as ASCII, instead of ending the command."""
    codecs.register_error("gemq", _encodable)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="gemq")


def _encodable(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of characters that cannot be encoded, and the position after them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    replacement = ""
    for character in error.object[error.start : error.end]:
        replacement += PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode()
    return replacement, error.end


def is_stdout(path: Path | None) -> bool:
    """Whether the ``--json`` file is ``-``, which stands for stdout."""
    return path is not None and str(path) == "-"


def check_json_path(path: Path | None) -> None:
    """Raise UserError early if the ``--json`` file is not writable."""
    if path is not None and not is_stdout(path):
        from gemq.runtime.files import check_writable

        if path.is_dir():
            raise UserError(f"--json {path} is a directory: name a file")
        if path.exists() and not path.is_file():  # a rename would replace a device or a pipe by a file
            raise UserError(f"--json {path} is not a regular file: name one, or - for the terminal")
        check_writable(path)


def output_json(path: Path | None, values: dict[str, Any]) -> bool:
    """Write ``values`` to the ``--json`` file, if any. Returns True if that is stdout, which then takes no tables."""
    if path is None:
        return False
    if is_stdout(path):
        print(json.dumps(values, indent=1))
        return True
    from gemq.runtime.files import write_json

    write_json(path, values)
    return False
