"""Calibration windows from the sources of ``--calibration``: files of text or rows, data sets, and the model itself.

Every source is packed into non-overlapping windows, which are drawn from by seed. The draw from a file is over all of
its windows. A data set is streamed and may have no end, so that the draw is over its first windows (``POOL``).
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemq.calibration.rows import RowReader, RowStats, row_texts
from gemq.calibration.texts import holds_rows, is_pipe, json_rows, text_bytes, text_chunks, text_digest
from gemq.calibration.tokens import check_tokens, foreign_token, tokenize_text
from gemq.calibration.windows import Windows, check_length, concat_sources, cut_windows, file_documents, pack_documents
from gemq.errors import UserError
from gemq.models.chat_template import chat_opening

SELF = "self"
"""Name of the source whose windows the model writes itself."""

POOL = 8
"""A data set is read until it fills this many times the windows requested in total."""

DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[^:/]*){0,2}")
FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")


class Streams:
    """The tokens of calibration sources. Each source is read once.

    Args:
        sources: as the user named them.
        tokenizer: of the model.
        seq_len: tokens of a window.
        count: number of windows requested from all sources.
        column: the column of rows to read; None: recognised by the known names.
        embeddings: number of tokens that the model has embeddings for, others are refused; None: unknown.

    Raises:
        UserError: a source is named twice. Others are raised by ``tokens_of``.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        seq_len: int,
        count: int,
        *,
        column: str | None = None,
        embeddings: int | None = None,
    ):
        _refuse_repeats(sources)
        self.sources, self.seq_len, self.count = sources, seq_len, count
        self.names = _unique_names(sources)
        self._tokenizer, self._column, self._embeddings = tokenizer, column, embeddings
        self._tokens: dict[str, Future[Tensor]] = {}
        self._stats = {source: RowStats() for source in sources}

    def start_reading(self) -> None:
        """Starts to read the files in a daemon thread: tokenizing releases the GIL.

        One thread, since tokenizers are not thread-safe.
        """
        files = [source for source in self.sources if source != SELF and _is_file(source)]
        self._tokens.update({source: Future() for source in files})

        def read_files() -> None:
            for source in files:
                self._read(source)

        threading.Thread(target=read_files, name="gemq-texts", daemon=True).start()

    def tokens_of(self, source: str) -> Tensor:
        """All tokens of a file, or the first tokens of a data set, documents joined: int32 [T], at least one window.

        Raises:
            UserError: the source cannot be used.
        """
        if source not in self._tokens:
            self._tokens[source] = Future()
            self._read(source)
        return self._tokens[source].result()

    def row_stats(self) -> dict[str, RowStats]:
        """By name, the statistics of sources that have rows and were read."""
        by_name = {name: self._stats[source] for name, source in zip(self.names, self.sources, strict=True)}
        return {name: stats for name, stats in by_name.items() if stats.columns}

    def _read(self, source: str) -> None:
        """Reads a source and sets its future."""
        try:
            tokens = _read_stream(source, self._tokenizer, self.seq_len, self.count, self._column, self._stats[source])
            check_tokens(tokens, self._embeddings, self._tokenizer, source)
            self._tokens[source].set_result(tokens)
        except Exception as error:  # noqa: BLE001 - ``tokens_of`` raises it
            self._tokens[source].set_exception(error)


class _Pool(NamedTuple):
    """The windows [n, seq_len] int32 of a source (None for ``self``), and how many of them calibration takes."""

    num_tokens: int
    windows: Tensor | None
    share: int

    def draw(self, seed: int, index: int, start: int, stop: int) -> Tensor:
        """Windows ``start`` to ``stop`` of the random order of source ``index``, sorted by position in the text."""
        assert self.windows is not None
        drawn = np.random.default_rng([seed, index]).permutation(len(self.windows))[start:stop]
        return self.windows[torch.from_numpy(np.sort(drawn))].long()


def _make_pools(streams: Streams) -> list[_Pool]:
    """The windows of each source, and how the requested windows are divided among them."""
    num_tokens: list[int] = []
    pools: list[Tensor | None] = []
    for source in streams.sources:
        if source == SELF:
            num_tokens.append(0)
            pools.append(None)
        else:
            tokens = streams.tokens_of(source)
            num_tokens.append(len(tokens))
            pools.append(cut_windows(tokens, streams.seq_len))
    shares = share_out(streams.count, [None if windows is None else len(windows) for windows in pools])
    return [_Pool(*pool) for pool in zip(num_tokens, pools, shares, strict=True)]


def calibration_windows(streams: Streams, *, seed: int, generate: Callable[[int], Tensor] | None = None) -> Windows:
    """Draws ``streams.count`` windows from all sources.

    A source is ``self``, a file (``.jsonl``, ``.ndjson`` and ``.json`` hold rows, anything else is one document of
    UTF-8 text), a pipe, or a data set id ``id[:config[:split]]``. Windows are divided evenly among sources, the
    remainder to the first ones. What one source lacks the others provide. If all of them lack windows, fewer are
    returned: see ``Windows.counts``. The draw is without replacement, and windows keep the order of their positions.

    Args:
        streams: the sources.
        seed: of the draw.
        generate: writes n windows of the source ``self``: n -> int64 [n, seq_len].

    Raises:
        UserError: a source cannot be used.
    """
    tokens_by_source, available = [], []
    for index, pool in enumerate(_make_pools(streams)):
        if pool.windows is not None:
            tokens_by_source.append(pool.draw(seed, index, 0, pool.share))
            available.append(pool.num_tokens)
            continue
        if generate is None:
            raise UserError("no model is at hand to write the windows of self: give a text file")
        generated = generate(pool.share).to("cpu", torch.int64)
        assert generated.shape == (pool.share, streams.seq_len)
        tokens_by_source.append(generated)
        available.append(generated.numel())
    return concat_sources(tokens_by_source, streams.names, available)


def held_out_windows(streams: Streams, *, seed: int, per_source: int) -> Windows:
    """Draws up to ``per_source`` windows of each source that ``calibration_windows`` does not take.

    They follow calibration's windows in the same random order. The source ``self`` gets none here, and a source with
    too little text gets fewer.
    """
    tokens_by_source, available = [], []
    for index, pool in enumerate(_make_pools(streams)):
        if pool.windows is None:
            tokens_by_source.append(torch.empty(0, streams.seq_len, dtype=torch.int64))
        else:
            tokens_by_source.append(pool.draw(seed, index, pool.share, pool.share + per_source))
        available.append(pool.num_tokens)
    return concat_sources(tokens_by_source, streams.names, available)


def check_sources(
    sources: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    *,
    column: str | None = None,
    embeddings: int | None = None,
    generates_windows: bool = True,
) -> None:
    """Refuses sources that cannot be used, as far as this is known without the network.

    Args:
        sources: as the user named them.
        tokenizer: of the model.
        seq_len: tokens of a window.
        column: the column of rows to read; None: recognised by the known names.
        embeddings: number of tokens that the model has embeddings for; None: unknown.
        generates_windows: whether the model also writes windows, which begin as its chat template says.

    Raises:
        UserError: names the source.
    """
    _refuse_repeats(sources)
    if generates_windows or SELF in sources:
        for tokens in chat_opening(tokenizer):
            check_tokens(torch.tensor(tokens), embeddings, tokenizer, "the model's chat template")
    for source in sources:
        if source == SELF:
            continue
        if _is_file(source):
            _check_file(source, tokenizer, seq_len, column, embeddings)
        else:
            _require_datasets(source)


def _check_file(source: str, tokenizer: Any, seq_len: int, column: str | None, embeddings: int | None) -> None:
    """Reads a whole file to find errors, and tokenizes its beginning."""
    foreign_tokens: dict[str, int] = {}
    if embeddings is not None:
        added_tokens = getattr(tokenizer, "added_tokens_decoder", {})
        foreign_tokens = {str(token): number for number, token in added_tokens.items() if number >= embeddings}
    num_tokens, path = 0, Path(source)
    reader = RowReader(tokenizer, column)
    texts = row_texts(json_rows(path), reader, RowStats(), source) if holds_rows(path) else text_chunks(path)
    for text in texts:
        for token, number in foreign_tokens.items():
            if token in text:
                raise UserError(foreign_token(token, number, embeddings or 0, source))
        if num_tokens < seq_len:  # the beginning of a text has more tokens than this but for odd texts
            tokens = tokenize_text(tokenizer, text[: 16 * seq_len])
            check_tokens(torch.tensor(tokens), embeddings, tokenizer, source)
            num_tokens += len(tokens)
    if num_tokens < seq_len:
        _read_stream(source, tokenizer, seq_len, 1, column, RowStats())


def source_digest(source: str) -> str:
    """A calibration source in a fingerprint: a file by its bytes, a data set by its id."""
    path = Path(source)
    if source == SELF or not (path.is_file() or is_pipe(path)):
        return source
    return f"{'pipe' if is_pipe(path) else path.name} {text_digest(path)}"


def host_bytes(sources: Sequence[str]) -> int:
    """Approximate bytes of host memory for the tokens of the sources' files: the size of their texts.

    Counts the files that exist, since an export may run without the texts of its job.
    """
    return sum(text_bytes(Path(source)) for source in sources if source != SELF and _exists(source))


def share_out(count: int, available: Sequence[int | None]) -> list[int]:
    """Divides ``count`` windows among sources as evenly as possible, the remainder to the first ones.

    Args:
        count: number of windows.
        available: windows of each source; None: no limit.
    """
    shares = [0] * len(available)
    while sum(shares) < count:
        missing = count - sum(shares)
        open_sources = [i for i, limit in enumerate(available) if limit is None or shares[i] < limit]
        if not open_sources:
            break
        share, remainder = divmod(missing, len(open_sources))
        for position, i in enumerate(open_sources):
            shares[i] += share + (position < remainder)
            limit = available[i]
            if limit is not None:
                shares[i] = min(shares[i], limit)
    return shares


def _refuse_repeats(sources: Sequence[str]) -> None:
    """Raises UserError if there is no source, or if one is named twice."""
    if not sources:
        raise UserError("no calibration source is given: name a text file, a data set id or self")
    seen: set[str] = set()
    for source in sources:
        key = str(Path(source).resolve()) if source != SELF and _exists(source) else source
        if key in seen:
            raise UserError(f"calibration source {source} is given twice: name it once")
        seen.add(key)


def _unique_names(sources: Sequence[str]) -> list[str]:
    """Names of the sources: the stem of a file, the id of a data set, ``pipe``, and ``self`` for the model's windows.

    A repeated name gets a number, as does a file called self.
    """
    names: list[str] = []
    for source in sources:
        if source == SELF:
            names.append(SELF)
            continue
        base = _base_name(source)
        name, number = base, 2
        while name in names or name == SELF:
            name = f"{base}-{number}"
            number += 1
        names.append(name)
    return names


def _base_name(source: str) -> str:
    """The name of a source before it is made unique."""
    path = Path(source)
    if is_pipe(path):
        return "pipe"
    return path.stem if _exists(source) else source


def _read_stream(source: str, tokenizer: Any, seq_len: int, count: int, column: str | None, stats: RowStats) -> Tensor:
    """All tokens of a file, or the first tokens of a data set, documents joined: int32 [T], at least one window.

    Args:
        source: a file or a data set id.
        tokenizer: of the model.
        seq_len: tokens of a window.
        count: number of windows requested from all sources.
        column: the column of rows to read; None: recognised by the known names.
        stats: counts the rows.
    """
    reader = RowReader(tokenizer, column)
    if _is_file(source):
        documents = file_documents(Path(source), tokenizer, reader, stats)
    else:
        texts = row_texts(_dataset_rows(source), reader, stats, source)
        documents = _take_tokens(POOL * count * seq_len, (tokenize_text(tokenizer, text) for text in texts))
    stream = pack_documents(documents, separator=tokenizer.eos_token_id)
    check_length(source, len(stream), seq_len)
    return stream


def _take_tokens(max_tokens: int, documents: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Yields documents until they have ``max_tokens`` tokens in all."""
    total = 0
    for document in documents:
        yield document
        total += len(document)
        if total >= max_tokens:
            return


def _is_file(source: str) -> bool:
    """Whether a source names a file, which may be missing, rather than a data set.

    A data set id is ``name`` or ``owner/name`` without the suffix of a file, or anything of that form followed by a
    configuration or a split after a colon.
    """
    if _exists(source):
        return True
    if not DATASET_ID.fullmatch(source) or source[0] == ".":
        return True
    return ":" not in source and bool(FILE_SUFFIX.search(source))


def _exists(source: str) -> bool:
    """Whether a source is the path of an existing file."""
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # no valid name of a file
        return False


def _require_datasets(source: str) -> None:
    """Raises UserError if the package ``datasets`` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"there is no file {source[:200]}; if it is a data set id, pip install datasets")


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Streams the rows of a Hugging Face data set, each with its location for messages."""
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
