"""Reads files of text in chunks: plain text, rows of JSON, and either of them through a pipe.

Works on bytes and characters. Must not deal with columns or tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import select
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from gemq.errors import UserError
from gemq.runtime.files import disk_errors

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Suffixes, in lower case, of files that hold rows."""

READ_BYTES = 1 << 20
"""Bytes that are read and decoded in one piece."""

WRITER_SECONDS = 5.0
"""How long a pipe may have no writer. A process substitution has one from the start."""

POLL_SECONDS = 0.05
"""Time between two looks for a writer."""

_spooled: dict[str, IO[bytes]] = {}
"""Copies of what came through pipes, by path: a pipe can be read once, and a text is read several times."""


def is_pipe(path: Path) -> bool:
    """Whether ``path`` is a named pipe or a process substitution."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def readable_path(path: Path) -> Path:
    """The path to read a text from: ``path`` itself, or a copy of what comes through a pipe.

    Raises:
        UserError: ``path`` is missing, a directory or a device, or its permissions forbid to read it.
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
        _spooled[key] = _spool(path)
    return Path(f"/proc/self/fd/{_spooled[key].fileno()}")


def _spool(pipe_path: Path) -> IO[bytes]:
    """Copies a pipe to an unnamed temporary file, which lives as long as the process."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - stays open, see above
    try:
        with disk_errors(Path(tempfile.gettempdir())):
            for data in _pipe_chunks(pipe_path):
                copy.write(data)
            copy.flush()
    except UserError:
        copy.close()
        raise
    return copy


def _pipe_chunks(pipe_path: Path) -> Iterator[bytes]:
    """Yields what is written to a pipe, until its last writer closes it.

    Opening a named pipe waits for a writer, so that a wrong path would stop the job for ever. The pipe is therefore
    opened without waiting. A writer may take any time before and between its writes.

    Raises:
        UserError: the pipe cannot be read, or nobody opens it for writing within ``WRITER_SECONDS``.
    """
    try:
        descriptor = os.open(pipe_path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"cannot read {pipe_path} ({_reason(error)}): write it to a file and give that") from error
    try:
        data = _first_chunk(descriptor, pipe_path)
        os.set_blocking(descriptor, True)
        while data:
            yield data
            data = os.read(descriptor, READ_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {pipe_path} ({_reason(error)}): write it to a file and give that") from error
    finally:
        os.close(descriptor)


def _first_chunk(descriptor: int, pipe_path: Path) -> bytes:
    """The first bytes from a pipe that was opened without waiting, empty if its writers wrote none.

    Raises:
        UserError: no writer comes within ``WRITER_SECONDS``.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + WRITER_SECONDS
    while True:
        had_writer = bool(poll.poll(0))  # data, or the end that a writer left
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:  # there is a writer, which has not written yet
            os.set_blocking(descriptor, True)
            return os.read(descriptor, READ_BYTES)
        if data or had_writer:
            return data
        if time.monotonic() > deadline:
            raise UserError(f"nothing writes to the pipe {pipe_path}: start its writer first, or give a text file")
        time.sleep(POLL_SECONDS)


def text_bytes(path: Path) -> int:
    """Size of a text in bytes."""
    return readable_path(path).stat().st_size


def text_digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text's bytes."""
    with readable_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def holds_rows(path: Path) -> bool:
    """Whether a file holds rows of JSON: by its suffix, or by its first line for a pipe, which has no suffix."""
    if not is_pipe(path):
        return path.suffix.lower() in ROW_SUFFIXES
    with readable_path(path).open("rb") as file:
        line = file.readline(READ_BYTES).removeprefix(codecs.BOM_UTF8)
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def text_chunks(path: Path) -> Iterator[str]:
    """Yields the text of a file in chunks of about ``READ_BYTES``. Windows line ends become \\n.

    Raises:
        UserError: the file cannot be read, is binary, is not UTF-8, or is empty. Some of this shows only at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = zero_bytes = 0
    is_empty, carry = True, ""
    with _open(path) as file:
        while True:
            data = file.read(READ_BYTES)
            size += len(data)
            zero_bytes += data.count(0)
            undecoded = len(decoder.getstate()[0])
            try:
                text = carry + decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                _refuse_binary(path, size, zero_bytes)
                position = size - len(data) - undecoded + error.start
                raise UserError(f"{path} is not UTF-8 (byte {position}): convert it to UTF-8") from error
            carry = ""
            if data and text.endswith("\r"):  # the \n of this line end may be in the next chunk
                text, carry = text[:-1], "\r"
            text = text.replace("\r\n", "\n")
            is_empty = is_empty and not text.strip()
            if text:
                yield text
            if not data:
                break
    _refuse_binary(path, size, zero_bytes)
    if is_empty:
        raise UserError(f"{path} is empty: give a file with text in it")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file and the location of each, for messages.

    A file holds one JSON value a line, or one array of all rows.

    Raises:
        UserError: as ``text_chunks``, or the file is not JSON.
    """
    chunks = text_chunks(path)
    beginning = next((chunk for chunk in chunks if chunk.strip()), "")
    if beginning.lstrip().startswith("[") and _is_array(beginning):
        yield from _array_rows(path, beginning + "".join(chunks))
        return
    for number, line in enumerate(_lines(chain([beginning], chunks)), start=1):
        if line.strip():
            yield f"{path} line {number}", _parse_line(path, number, line)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Yields lines without their ends. ``splitlines`` would also split at characters such as U+2028 in strings."""
    pending: list[str] = []
    for chunk in chunks:
        lines = chunk.split("\n")
        pending.append(lines[0])
        if len(lines) > 1:
            yield "".join(pending)
            yield from lines[1:-1]
            pending = [lines[-1]]
    yield "".join(pending)


def _is_array(beginning: str) -> bool:
    """Whether a text that begins with a bracket is one array of rows, rather than an array in each line."""
    line = beginning.lstrip().partition("\n")[0].strip()
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return True  # the array continues in the next line
    return bool(values) and all(isinstance(value, dict) for value in values)


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of an array. Decoding all of them in one call would take many times the memory of the text."""
    decoder, position, number = json.JSONDecoder(), text.index("[") + 1, 0
    while True:
        position = _skip_spaces(text, position)
        if number and text[position : position + 1] == ",":
            position = _skip_spaces(text, position + 1)
        elif number and text[position : position + 1] != "]":
            raise UserError(f"{path} is not JSON after row {number}: copy the file again, or write one row a line")
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise UserError(f"{path} has text after its array of rows: write one array, or one row a line")
            return
        number += 1
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number} is not JSON ({_reason(error)}): copy the file again") from error
        yield f"{path} row {number}", row


def _skip_spaces(text: str, position: int) -> int:
    """The first position from ``position`` on that holds no white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _parse_line(path: Path, number: int, line: str) -> Any:
    """The JSON value of a line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path} line {number} is not JSON ({_reason(error)}): write one object a line, such as {{"text": "..."}}'
        ) from error


def _open(path: Path) -> IO[bytes]:
    """Opens a text for reading."""
    try:
        return readable_path(path).open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path} ({_reason(error)}): check its permissions") from error


def _refuse_binary(path: Path, size: int, zero_bytes: int) -> None:
    """Raises UserError if more than a tenth of a file's bytes are zero.

    Real text collections contain a few NUL bytes. Binary files and UTF-16 are full of them.
    """
    if zero_bytes * 10 > size:
        raise UserError(f"{path} is a binary file: give a text file")


def _reason(error: Exception) -> str:
    """A short reason for an error of reading or decoding."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(getattr(error, "msg", error))
