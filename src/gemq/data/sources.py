"""Calibration windows from what ``--calib`` names: text and JSONL files, data set ids, and the model itself.

Every source is packed into non-overlapping windows and drawn from by seed. Of a file the draw is over all of
its windows; a data set is streamed and may have no end, so there it is over the first ones read (``POOL``).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.data.windows import (
    Windows,
    check_length,
    cut_windows,
    from_parts,
    pack_documents,
    read_text,
    tokenize_text,
)
from gemq.errors import UserError

SELF = "self"
POOL = 8
"""A data set is read until it has filled this many times the windows asked for in total."""

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]*){0,2}")
FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")


class Streams:
    """The tokens of calibration sources, each read once.

    window, count: tokens of a window, and how many windows are asked for in total
    Raises UserError, where a source is asked for, if it cannot be used.
    """

    def __init__(self, sources: Sequence[str], tokenizer: Any, window: int, count: int):
        _refuse_repeats(sources)
        self.sources, self.window, self.count = sources, window, count
        self._tokenizer = tokenizer
        self._tokens: dict[str, Future[Tensor]] = {}

    def begin(self) -> None:
        """Begins to read files in a thread: tokenizing leaves Python free. One, as tokenizers are not for several.

        Nobody waits for it when the process ends.
        """
        files = [source for source in self.sources if source != SELF and _is_file(source)]
        self._tokens.update({source: Future() for source in files})
        threading.Thread(target=lambda: list(map(self._read, files)), name="gemq-texts", daemon=True).start()

    def of(self, source: str) -> Tensor:
        """All tokens of a file, or the first of a data set, documents joined: int64 [T], at least one window."""
        if source not in self._tokens:
            self._tokens[source] = Future()
            self._read(source)
        return self._tokens[source].result()

    def _read(self, source: str) -> None:
        try:
            self._tokens[source].set_result(_stream(source, self._tokenizer, self.window, self.count))
        except Exception as error:  # noqa: BLE001 - whoever asks for the source is told
            self._tokens[source].set_exception(error)


def calibration_windows(
    streams: Streams,
    *,
    seed: int,
    generate: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """As many windows from all sources together as ``streams`` are for.

    A source is ``self`` (``generate(n)`` writes int64 [n, window]), a file (``.jsonl`` and ``.json`` hold one
    JSON object a line, anything else is one document of UTF-8 text), or a data set id
    ``id[:config[:split]]``. Windows are shared out evenly, the remainder to the first sources; what one
    source lacks the others give. Drawn by ``seed`` without replacement, then kept in the order of their
    positions. Fewer come back when the sources hold no more: see ``Windows.counts``.
    ``progress(done, total)`` counts windows.

    Raises UserError for a source that cannot be used.
    """
    names, tokens, pools, shares = _shared_out(streams)
    parts, available = [], []
    for index, (stream, pool, share) in enumerate(zip(tokens, pools, shares, strict=True)):
        if stream is None or pool is None:
            if generate is None:
                raise UserError("no model is at hand to write the windows of self: give a text file")
            part = generate(share).to("cpu", torch.int64)
            assert part.shape == (share, streams.window)
            available.append(part.numel())
        else:
            part = _drawn(pool, seed, index, 0, share)
            available.append(len(stream))
        parts.append(part)
        if progress:
            progress(sum(map(len, parts)), sum(shares))
    return from_parts(parts, names, available)


def held_out_windows(streams: Streams, *, seed: int, held_out: int) -> Windows:
    """Up to ``held_out`` windows of each source that ``calibration_windows`` does not take.

    The draw simply goes on behind the calibration's. ``self`` gets none here, a source without further text fewer.
    """
    names, tokens, pools, shares = _shared_out(streams)
    parts, available = [], []
    for index, (stream, pool, share) in enumerate(zip(tokens, pools, shares, strict=True)):
        if stream is None or pool is None:
            parts.append(torch.empty(0, streams.window, dtype=torch.int64))
            available.append(0)
        else:
            parts.append(_drawn(pool, seed, index, share, share + held_out))
            available.append(len(stream))
    return from_parts(parts, names, available)


def check_sources(sources: Sequence[str], tokenizer: Any, window: int) -> None:
    """Refuses sources that cannot be used, as far as that shows without the network. Raises UserError."""
    _refuse_repeats(sources)
    for source in sources:
        if source == SELF:
            continue
        if _is_file(source):
            documents = list(_file_documents(Path(source)))
            heads = (document[: 16 * window] for document in documents)  # enough, but for odd texts
            if sum(len(tokenize_text(tokenizer, head)) for head in heads) < window:
                _stream(source, tokenizer, window, count=1)
        else:
            _require_datasets(source)


def share_out(count: int, available: Sequence[int | None]) -> list[int]:
    """Windows to take from each source: as even as its ``available`` windows (None: no limit) allow, first
    ones first."""
    shares = [0] * len(available)
    while rest := count - sum(shares):
        open_ = [i for i, limit in enumerate(available) if limit is None or shares[i] < limit]
        if not open_:
            break
        for place, i in enumerate(open_):
            wanted = shares[i] + rest // len(open_) + (place < rest % len(open_))
            limit = available[i]
            shares[i] = wanted if limit is None else min(wanted, limit)
    return shares


def _shared_out(
    streams: Streams,
) -> tuple[list[str], list[Tensor | None], list[Tensor | None], list[int]]:
    """Of each source its name, its tokens, its windows (None for ``self``) and how many calibration takes."""
    names = _unique_names(streams.sources)
    tokens = [None if source == SELF else streams.of(source) for source in streams.sources]
    pools = [None if stream is None else cut_windows(stream, streams.window) for stream in tokens]
    shares = share_out(streams.count, [None if pool is None else len(pool) for pool in pools])
    return names, tokens, pools, shares


def _drawn(pool: Tensor, seed: int, index: int, start: int, stop: int) -> Tensor:
    """Windows ``start`` to ``stop`` of the source's random order, in the order of their positions in the text."""
    drawn = np.random.default_rng([seed, index]).permutation(len(pool))[start:stop]
    return pool[torch.from_numpy(np.sort(drawn))]


def _refuse_repeats(sources: Sequence[str]) -> None:
    if not sources:
        raise UserError("no calibration source is given: name a text file, a data set id or self")
    seen: set[str] = set()
    for source in sources:
        key = str(Path(source).resolve()) if source != SELF and os.path.exists(source) else source
        if key in seen:
            raise UserError(f"calibration source {source} is given twice: name it once")
        seen.add(key)


def _unique_names(sources: Sequence[str]) -> list[str]:
    """The stem of a file, the id of a data set, ``self``; a repeated name gets a number."""
    names: list[str] = []
    for source in sources:
        base = Path(source).stem if source != SELF and os.path.exists(source) else source
        candidates = chain([base], (f"{base}-{number}" for number in range(2, len(sources) + 2)))
        names.append(next(name for name in candidates if name not in names))
    return names


def _stream(source: str, tokenizer: Any, window: int, count: int) -> Tensor:
    """All tokens of a file, or the first of a data set, documents joined: int64 [T], at least one window."""
    if _is_file(source):
        limit = None
        documents = _file_documents(Path(source))
    else:
        limit = POOL * count * window
        documents = _dataset(source)

    tokens: list[list[int]] = []
    total = 0
    for document in documents:
        tokens.append(tokenize_text(tokenizer, document))
        total += len(tokens[-1])
        if limit is not None and total >= limit:
            break
    stream = pack_documents(tokens, separator=tokenizer.eos_token_id)
    check_length(source, len(stream), window)
    return stream


def _file_documents(path: Path) -> Iterator[str]:
    text = read_text(path)
    return _json_lines(path, text) if path.suffix in (".jsonl", ".json") else iter([text])


def _json_lines(path: Path, text: str) -> Iterator[str]:
    """The documents of a JSONL file: the field ``text`` of each object, else its first string."""
    # Not splitlines(): JSON strings may hold characters such as U+2028 that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
            reason = getattr(error, "msg", None) or str(error)
            raise UserError(
                f'{path} line {number} is not JSON ({reason}): write one object a line, such as {{"text": "..."}}'
            ) from error
        yield _text_of(row, f"{path} line {number}")


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object: write one object a line, such as {{"text": "..."}}')
    strings = [row.get("text"), *row.values()]
    text = next((value for value in strings if isinstance(value, str)), None)
    if text is None:
        raise UserError(f'{where} has no string field: name the text\'s field "text"')
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # cut emoji leave half a pair


def _is_file(source: str) -> bool:
    """Whether a source is a file, there or not: a data set id is ``name`` or ``owner/name`` without a file's
    suffix."""
    is_id = bool(DATASET_ID.fullmatch(source)) and source[0] != "." and not FILE_SUFFIX.search(source)
    return os.path.exists(source) or not is_id  # False for a name that is too long for a path


def _require_datasets(source: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"there is no file {source[:200]}; if it is a data set id, pip install gemq[datasets]")


def _dataset(source: str) -> Iterator[str]:
    """The documents of a Hugging Face data set, streamed."""
    _require_datasets(source)
    import datasets  # optional, and slow to import

    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _text_of(row, f"data set {source}")
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} is neither a file nor a data set that can be read ({reason}): "
            "check the path, or write the data set as id:config:split"
        ) from error
