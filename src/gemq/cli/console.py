"""What goes to the terminal and to JSON files. Imports torch only inside functions, as the command line does."""

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
"""Columns of a table that goes to a pipe or a file."""

PLAIN = {"·": ".", "±": "+-", "…": "...", "│": "|", "─": "-", "━": "-"}
"""What stands for characters of ours where an encoding lacks them."""


def make_monitor(quiet: bool) -> Monitor:
    from gemq.runtime.progress import Monitor

    quiet_libraries()
    return Monitor(None if quiet else SafeConsole(stderr=True, highlight=False))


def quiet_libraries() -> None:
    """Our own bars tell what happens; Transformers' would only interrupt them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
    # Transformers tells developers of names that will change; a user of the command line cannot follow that.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*deprecated")


class _Console(SafeConsole):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1; see ``run``


def make_console() -> SafeConsole:
    console = _Console(highlight=False)
    if not console.is_terminal:  # whole lines and tables for pipes and files, whole words for people
        console.soft_wrap = True
        if "COLUMNS" not in os.environ:
            console.width = UNBOUNDED_WIDTH
    return console


def use_any_encoding() -> None:
    """Lets stdout show what its encoding lacks, such as ASCII's, rather than end the command."""
    codecs.register_error("gemq", _encodable)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="gemq")


def _encodable(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that cannot be encoded, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def to_stdout(path: Path | None) -> bool:
    return path is not None and str(path) == "-"


def check_json(path: Path | None) -> None:
    """Refuses a file for figures that cannot be written, before they have cost anything."""
    if path is not None and not to_stdout(path):
        from gemq.runtime.files import check_writable

        if path.is_dir():
            raise UserError(f"--json {path} is a directory: name a file")
        if path.exists() and not path.is_file():  # a rename would put a file in the place of a device or a pipe
            raise UserError(f"--json {path} is not a regular file: name one, or - for the terminal")
        check_writable(path)


def print_json(path: Path | None, values: dict[str, Any]) -> bool:
    """Writes figures to ``path``. True when they went to stdout, where tables would spoil them."""
    if path is None:
        return False
    if to_stdout(path):
        print(json.dumps(values, indent=1))
        return True
    from gemq.runtime.files import write_json

    write_json(path, values)
    return False
