"""Calibration windows from what ``--calib`` names: text and JSONL files, data set ids, and the model itself.

Every source is packed into non-overlapping windows and drawn from by seed. Of a file the draw is over all of
its windows; a data set is streamed and may have no end, so there it is over the first ones read (``POOL``).
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.calibration.rows import RowReader, Rows, texts_of
from gemq.calibration.texts import holds_rows, is_pipe, json_rows, text_bytes, text_digest, text_parts
from gemq.calibration.tokens import check_tokens, foreign_token, tokenize_text
from gemq.calibration.windows import Windows, check_length, cut_windows, file_documents, from_parts, pack_documents
from gemq.errors import UserError
from gemq.models.chat_template import chat_opening

SELF = "self"
POOL = 8
"""A data set is read until it has filled this many times the windows asked for in total."""

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]*){0,2}")
FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")


class Streams:
    """The tokens of calibration sources, each read once.

    window, count: tokens of a window, and how many windows are asked for in total
    column: whose text to take from rows; None: by the known names
    embeddings: tokens that the model has embeddings for, others are refused; None: not known
    Raises UserError, where a source is asked for, if it cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        window: int,
        count: int,
        *,
        column: str | None = None,
        embeddings: int | None = None,
    ):
        _refuse_repeats(sources)
        self.sources, self.window, self.count = sources, window, count
        self.names = _unique_names(sources)
        self._tokenizer, self._column, self._embeddings = tokenizer, column, embeddings
        self._tokens: dict[str, Future[Tensor]] = {}
        self._read = {source: Rows() for source in sources}

    def begin(self) -> None:
        """Begins to read files in a thread: tokenizing leaves Python free. One, as tokenizers are not for several.

        Nobody waits for it when the process ends.
        """
        files = [source for source in self.sources if source != SELF and _is_file(source)]
        self._tokens.update({source: Future() for source in files})
        threading.Thread(target=lambda: list(map(self._start, files)), name="gemq-texts", daemon=True).start()

    def of(self, source: str) -> Tensor:
        """All tokens of a file, or the first of a data set, documents joined: int32 [T], at least one window."""
        if source not in self._tokens:
            self._tokens[source] = Future()
            self._start(source)
        return self._tokens[source].result()

    def rows(self) -> dict[str, Rows]:
        """By name, what was read of those sources that have rows, as far as they were read."""
        read = {name: self._read[source] for name, source in zip(self.names, self.sources, strict=True)}
        return {name: rows for name, rows in read.items() if rows.columns}

    def _start(self, source: str) -> None:
        try:
            tokens = _stream(source, self._tokenizer, self.window, self.count, self._column, self._read[source])
            check_tokens(tokens, self._embeddings, self._tokenizer, source)
            self._tokens[source].set_result(tokens)
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

    A source is ``self`` (``generate(n)`` writes int64 [n, window]), a file (``.jsonl``, ``.ndjson`` and ``.json`` hold
    rows, anything else is one document of UTF-8 text), a pipe, or a data set id ``id[:config[:split]]``. Windows are
    shared out evenly, the remainder to the first sources; what one source lacks the others give. Drawn by ``seed``
    without replacement, then kept in the order of their positions. Fewer come back when the sources hold no more: see
    ``Windows.counts``.
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


def check_sources(
    sources: Sequence[str],
    tokenizer: Any,
    window: int,
    *,
    column: str | None = None,
    embeddings: int | None = None,
    written: bool = True,
) -> None:
    """Refuses sources that cannot be used, as far as that shows without the network.

    Args:
        window: tokens of a window
        column: whose text to take from rows; None: by the known names
        embeddings: tokens that the model has embeddings for; None: not known
        written: whether the model writes windows as well, which begin as its chat template says

    Raises:
        UserError: names the source
    """
    _refuse_repeats(sources)
    if written or SELF in sources:
        for part in chat_opening(tokenizer):
            check_tokens(torch.tensor(part), embeddings, tokenizer, "the model's chat template")
    for source in sources:
        if source == SELF:
            continue
        if not _is_file(source):
            _require_datasets(source)
            continue
        _check_file(source, tokenizer, window, column, embeddings)


def _check_file(source: str, tokenizer: Any, window: int, column: str | None, embeddings: int | None) -> None:
    """Reads all of a file, for what is wrong in it, and tokenizes its beginning."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    foreign = {str(token): number for number, token in added if embeddings is not None and number >= embeddings}
    count, path = 0, Path(source)
    reader = RowReader(tokenizer, column)
    texts = texts_of(json_rows(path), reader, Rows(), source) if holds_rows(path) else text_parts(path)
    for text in texts:
        for token, number in foreign.items():
            if token in text:
                raise UserError(foreign_token(token, number, embeddings or 0, source))
        if count < window:  # a beginning is enough, but for odd texts
            tokens = tokenize_text(tokenizer, text[: 16 * window])
            check_tokens(torch.tensor(tokens), embeddings, tokenizer, source)
            count += len(tokens)
    if count < window:
        _stream(source, tokenizer, window, 1, column, Rows())


def source_digest(source: str) -> str:
    """A calibration source as a fingerprint sees it: a file by its bytes, a data set by its id."""
    path = Path(source)
    if source == SELF or not (path.is_file() or is_pipe(path)):
        return source
    return f"{'pipe' if is_pipe(path) else path.name} {text_digest(path)}"


def host_bytes(sources: Sequence[str]) -> int:
    """Bytes of host memory that the tokens of the sources' files take, about: as many as their texts.

    Counts the files that exist. An export may run without the texts of its job.
    """
    return sum(text_bytes(Path(source)) for source in sources if source != SELF and _exists(source))


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
    tokens = [None if source == SELF else streams.of(source) for source in streams.sources]
    pools = [None if stream is None else cut_windows(stream, streams.window) for stream in tokens]
    shares = share_out(streams.count, [None if pool is None else len(pool) for pool in pools])
    return streams.names, tokens, pools, shares


def _drawn(pool: Tensor, seed: int, index: int, start: int, stop: int) -> Tensor:
    """Windows ``start`` to ``stop`` of the source's random order, in the order of their positions in the text."""
    drawn = np.random.default_rng([seed, index]).permutation(len(pool))[start:stop]
    return pool[torch.from_numpy(np.sort(drawn))].long()


def _refuse_repeats(sources: Sequence[str]) -> None:
    if not sources:
        raise UserError("no calibration source is given: name a text file, a data set id or self")
    seen: set[str] = set()
    for source in sources:
        key = str(Path(source).resolve()) if source != SELF and _exists(source) else source
        if key in seen:
            raise UserError(f"calibration source {source} is given twice: name it once")
        seen.add(key)


def _unique_names(sources: Sequence[str]) -> list[str]:
    """The stem of a file, the id of a data set, ``pipe``, and ``self`` for what the model writes; a repeated name, also
    a file called self, gets a number."""
    names: list[str] = []
    for source in sources:
        if source == SELF:
            names.append(SELF)
            continue
        path = Path(source)
        base = "pipe" if is_pipe(path) else path.stem if _exists(source) else source
        candidates = chain([base], (f"{base}-{number}" for number in range(2, len(sources) + 3)))
        names.append(next(name for name in candidates if name not in names and name != SELF))
    return names


def _stream(source: str, tokenizer: Any, window: int, count: int, column: str | None, rows: Rows) -> Tensor:
    """All tokens of a file, or the first of a data set, documents joined: int32 [T], at least one window.

    column: whose text to take from rows; what was read of them is counted in ``rows``
    """
    reader = RowReader(tokenizer, column)
    if _is_file(source):
        documents = file_documents(Path(source), tokenizer, reader, rows)
    else:
        texts = texts_of(_dataset(source), reader, rows, source)
        documents = _first(POOL * count * window, (tokenize_text(tokenizer, text) for text in texts))
    stream = pack_documents(documents, separator=tokenizer.eos_token_id)
    check_length(source, len(stream), window)
    return stream


def _first(limit: int, documents: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Documents until they have ``limit`` tokens together."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= limit:
            return


def _is_file(source: str) -> bool:
    """Whether a source is a file, there or not: a data set id is ``name`` or ``owner/name`` without a file's suffix,
    or anything of that form with a configuration or a split behind a colon."""
    is_id = bool(DATASET_ID.fullmatch(source)) and source[0] != "."
    return _exists(source) or not is_id or (":" not in source and bool(FILE_SUFFIX.search(source)))


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # nothing that could be the name of a file
        return False


def _require_datasets(source: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"there is no file {source[:200]}; if it is a data set id, pip install datasets")


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    """The rows of a Hugging Face data set, streamed, with where they are for messages."""
    _require_datasets(source)
    import datasets  # optional, and slow to import

    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield f"data set {source}", row
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source} is neither a file nor a data set that can be read ({reason}): "
            "check the path, or write the data set as id:config:split"
        ) from error
