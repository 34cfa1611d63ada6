"""Files of text, read in pieces: plain text, rows of JSON, and either of them from a pipe.

Knows bytes and characters, no columns and no tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from gemq.errors import UserError
from gemq.runtime.files import disk_errors

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Of files that hold rows, in any case."""

READ_BYTES = 1 << 20

_spooled: dict[str, IO[bytes]] = {}
"""What came through a pipe, by its path: it is read once, and asked for several times."""


def is_pipe(path: Path) -> bool:
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def readable(path: Path) -> Path:
    """The path to read a text from: the file itself, or a copy of what comes through a pipe.

    Raises:
        UserError: it is missing, a directory, a device, or its permissions forbid it
    """
    key = str(path)
    if key not in _spooled:
        if path.is_dir():
            raise UserError(f"{path} is a directory: name a text file in it")
        try:
            mode = path.stat().st_mode
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: check the path") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({_reason(error)}): check the path and its permissions") from error
        if stat.S_ISREG(mode):
            return path
        if not stat.S_ISFIFO(mode):
            raise UserError(f"{path} is neither a file nor a pipe: give a text file")
        copy = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process, and has no name to leave behind
        try:
            with path.open("rb") as pipe, disk_errors(Path(tempfile.gettempdir())):
                shutil.copyfileobj(pipe, copy, READ_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {path} ({_reason(error)}): write it to a file and give that") from error
        copy.flush()
        _spooled[key] = copy
    return Path(f"/proc/self/fd/{_spooled[key].fileno()}")


def text_bytes(path: Path) -> int:
    """Size of a text in bytes."""
    return readable(path).stat().st_size


def text_digest(path: Path) -> str:
    """The first 16 digits of the SHA-256 of a text's bytes."""
    with readable(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows of JSON: by its name, or, of a pipe, whose name says nothing, by its first line."""
    if not is_pipe(path):
        return path.suffix.lower() in ROW_SUFFIXES
    with readable(path).open("rb") as file:
        line = file.readline(READ_BYTES).removeprefix(codecs.BOM_UTF8)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def text_parts(path: Path) -> Iterator[str]:
    """The text of a file, in parts of about ``READ_BYTES``, Windows line ends as \\n.

    Raises:
        UserError: it cannot be read, is binary, is not UTF-8, or is empty; some only when all is read
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = zeros = 0
    empty, held_back = True, ""
    with _opened(path) as file:
        while True:
            data = file.read(READ_BYTES)
            size, zeros = size + len(data), zeros + data.count(0)
            before = len(decoder.getstate()[0])
            try:
                text = held_back + decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                _refuse_binary(path, size, zeros)
                at = size - len(data) - before + error.start
                raise UserError(f"{path} is not UTF-8 (byte {at}): convert it to UTF-8") from error
            # the other half of a line end may be in the next part
            text, held_back = (text[:-1], "\r") if data and text.endswith("\r") else (text, "")
            text = text.replace("\r\n", "\n")
            empty = empty and not text.strip()
            if text:
                yield text
            if not data:
                break
    _refuse_binary(path, size, zeros)
    if empty:
        raise UserError(f"{path} is empty: give a file with text in it")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file with where each is, for messages: one JSON value a line, or one array of all rows.

    Raises:
        UserError: as ``text_parts``, and for what is not JSON
    """
    parts = text_parts(path)
    start = next((part for part in parts if part.strip()), "")
    if start.lstrip().startswith("[") and _is_array(start):
        yield from _array_rows(path, start + "".join(parts))
        return
    for number, line in enumerate(_lines(chain([start], parts)), start=1):
        yield from _line_rows(path, number, line)


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends. Not ``splitlines``: JSON strings may hold characters such as U+2028."""
    pending: list[str] = []
    for part in parts:
        first, *others = part.split("\n")
        pending.append(first)
        if others:
            yield "".join(pending)
            yield from others[:-1]
            pending = [others[-1]]
    yield "".join(pending)


def _is_array(start: str) -> bool:
    """Whether a text that begins with a bracket is an array of rows, rather than one array in each line."""
    line = start.lstrip().partition("\n")[0].strip()
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return True  # goes on in the next line
    return bool(first) and all(isinstance(value, dict) for value in first)


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of an array, decoded one at a time: all at once would take many times the text's memory."""
    decoder, at, number = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        at = _next_sign(text, at)
        if number and text[at : at + 1] == ",":
            at = _next_sign(text, at + 1)
        elif number and text[at : at + 1] != "]":
            raise UserError(f"{path} is not JSON behind row {number}: copy the file again, or write one row a line")
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise UserError(f"{path} goes on behind its array of rows: write one array, or one row a line")
            return
        number += 1
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number} is not JSON ({_reason(error)}): copy the file again") from error
        yield f"{path} row {number}", row


def _next_sign(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _line_rows(path: Path, number: int, line: str) -> Iterator[tuple[str, Any]]:
    if not line.strip():
        return
    try:
        yield f"{path} line {number}", json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path} line {number} is not JSON ({_reason(error)}): write one object a line, such as {{"text": "..."}}'
        ) from error


def _opened(path: Path) -> IO[bytes]:
    try:
        return readable(path).open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path} ({_reason(error)}): check its permissions") from error


def _refuse_binary(path: Path, size: int, zeros: int) -> None:
    # real collections of text hold a stray NUL here and there; binary files and UTF-16 are full of them
    if zeros * 10 > size:
        raise UserError(f"{path} is a binary file: give a text file")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(getattr(error, "msg", error))
