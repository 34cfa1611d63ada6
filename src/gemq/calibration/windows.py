"""Windows of tokens: packing of documents, micro-batches, storage, and the windows of an evaluation.

A window is a sequence of ``seq_len`` consecutive tokens of one source. Nothing here adds special tokens to a text,
except the end tokens that separate documents and those of chat templates.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from gemq.calibration.rows import RowReader, RowStats, row_texts
from gemq.calibration.texts import holds_rows, json_rows, text_chunks
from gemq.calibration.tokens import check_tokens, tokenize_pieces, tokenize_text
from gemq.errors import UserError


@dataclass(frozen=True, eq=False)
class Windows:
    """N windows of equal length. Those of one source are consecutive."""

    tokens: Tensor
    """int64 [N, seq_len]"""
    source: Tensor
    """int64 [N]: index into ``names``"""
    names: tuple[str, ...]
    """Name of each source, unique."""
    tokens_available: tuple[int, ...]
    """Tokens of each source, including those in none of the windows."""

    def __post_init__(self) -> None:
        assert self.tokens.dtype == self.source.dtype == torch.int64
        assert self.tokens.dim() == 2
        assert self.source.shape == self.tokens.shape[:1]
        assert len(set(self.names)) == len(self.names) == len(self.tokens_available)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    def counts(self) -> dict[str, int]:
        """Number of windows by source."""
        counts = torch.bincount(self.source, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def by_source(self) -> list[Tensor]:
        """The tokens [n, seq_len] of each source's windows."""
        return [self.tokens[self.source == index] for index in range(len(self.names))]

    def select_source(self, source: int) -> Windows:
        """The windows of one source, by its index."""
        tokens = self.tokens[self.source == source]
        return concat_sources([tokens], [self.names[source]], [self.tokens_available[source]])

    def subsample(self, tokens: int) -> Windows:
        """A subset with about ``tokens`` tokens in all; 0 for all windows.

        Takes the same fraction of every source, at least one window of each, evenly spaced.
        """
        total_tokens = self.tokens.numel()
        if not 0 < tokens < total_tokens:
            return self
        subsets = []
        for windows in self.by_source():
            count = max(1, round(len(windows) * tokens / total_tokens))
            subsets.append(windows[torch.arange(count) * len(windows) // count])
        return concat_sources(subsets, self.names, self.tokens_available)

    def extended(self, name: str, tokens: Tensor) -> Windows:
        """These windows and further ones of the source ``name``, which may be new.

        Args:
            name: of the source.
            tokens: int64 [n, seq_len]
        """
        names, tokens_by_source, available = list(self.names), self.by_source(), list(self.tokens_available)
        if name not in names:
            names.append(name)
            tokens_by_source.append(self.tokens[:0])
            available.append(0)
        index = names.index(name)
        tokens_by_source[index] = torch.cat([tokens_by_source[index], tokens])
        available[index] += tokens.numel()
        return concat_sources(tokens_by_source, names, available)

    def batches(self, micro_batch_tokens: int) -> Iterator[slice]:
        """Yields micro-batches as slices of the windows, in stored order, each of at least one window.

        They depend on ``micro_batch_tokens`` (tokens of a micro-batch) alone and not on the available memory, so that
        sums over micro-batches round in the same way on every machine.
        """
        step = max(1, micro_batch_tokens // self.tokens.shape[1])
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def to_tensors(self) -> dict[str, Tensor]:
        """``tokens`` and ``source`` as files store them: int32, on the CPU."""
        tensors = {"tokens": self.tokens, "source": self.source}
        return {name: tensor.to("cpu", torch.int32).contiguous() for name, tensor in tensors.items()}

    def metadata(self) -> dict[str, Any]:
        """What files store besides the tensors, as plain values."""
        return {"names": self.names, "tokens_available": self.tokens_available}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Windows:
        """The inverse of ``to_tensors`` and ``metadata``."""
        tokens, source = tensors["tokens"].long(), tensors["source"].long()
        return cls(tokens, source, tuple(about["names"]), tuple(about["tokens_available"]))

    def to_bytes(self) -> bytes:
        """A safetensors file. Equal windows have equal bytes."""
        # a single metadata key, since safetensors writes several in no fixed order
        return safetensors.torch.save(self.to_tensors(), metadata={"windows": json.dumps(self.metadata())})

    def digest(self) -> str:
        """SHA-256 of ``to_bytes``, for fingerprints of the calibration set."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        """Reads a file of ``to_bytes``, or the windows of a work directory. Both have a single metadata key."""
        with safe_open(path, framework="pt") as file:
            (about,) = file.metadata().values()
            tensors = {name: file.get_tensor(name) for name in ("tokens", "source")}
        return cls.from_tensors(tensors, json.loads(about))


def pack_documents(documents: Iterable[Iterable[int]], *, separator: int | None) -> Tensor:
    """Concatenates documents to one stream int32 [T], with the token ``separator``, if any, between two of them."""
    stream = array("i")
    for index, document in enumerate(documents):
        if index and separator is not None:
            stream.append(separator)
        stream.extend(document)
    return torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)


def file_documents(path: Path, tokenizer: Any, reader: RowReader, stats: RowStats) -> Iterator[Iterable[int]]:
    """Yields the token ids of a file's documents: one for each row, or one for a whole text, read in chunks.

    Args:
        path: of the file.
        tokenizer: of the model.
        reader: extracts the text of rows.
        stats: counts the rows.

    Raises:
        UserError: the file cannot be used.
    """
    if holds_rows(path):
        for text in row_texts(json_rows(path), reader, stats, str(path)):
            yield tokenize_text(tokenizer, text)
    else:
        yield chain.from_iterable(tokenize_pieces(tokenizer, text_chunks(path)))


def cut_windows(stream: Tensor, seq_len: int) -> Tensor:
    """Non-overlapping windows [T // seq_len, seq_len] of a stream [T], as a view. The remainder is dropped."""
    count = len(stream) // seq_len
    return stream[: count * seq_len].view(count, seq_len)


def check_length(name: str, tokens: int, seq_len: int) -> None:
    """Raises UserError if the number of ``tokens`` of a text is too small for one window."""
    if tokens < seq_len:
        raise UserError(
            f"{name} has {tokens} tokens, fewer than a window of {seq_len}: give a longer text or a smaller --seq-len"
        )


def eval_windows(
    tokenizer: Any,
    files: Sequence[str | Path],
    seq_len: int,
    max_windows: int | None = None,
    *,
    column: str | None = None,
    embeddings: int | None = None,
    row_stats: dict[str, RowStats] | None = None,
) -> Windows:
    """The non-overlapping windows of each file, in order. A source is named by the stem of its file.

    Rows are joined as for calibration. Tokens after the last full window are dropped.

    Args:
        tokenizer: of the model.
        files: of text or rows.
        seq_len: tokens of a window.
        max_windows: windows to take from the start of each file; None: all.
        column: the column of rows to read; None: recognised by the known names.
        embeddings: number of tokens that the model has embeddings for; None: unknown.
        row_stats: receives the statistics of files that hold rows, by source.

    Raises:
        UserError: a file cannot be used, or two files have the same stem.
    """
    paths: dict[str, Path] = {}
    for path in map(Path, files):
        if path.stem in paths:
            raise UserError(f"{paths[path.stem]} and {path} share the stem {path.stem!r}: rename one of them")
        paths[path.stem] = path
    if not paths:
        raise UserError("no text to evaluate on: give at least one text file")

    reader = RowReader(tokenizer, column, flag="--text-column")
    separator = getattr(tokenizer, "eos_token_id", None)
    windows, available = [], []
    for name, path in paths.items():
        stats = RowStats()
        stream = pack_documents(file_documents(path, tokenizer, reader, stats), separator=separator)
        if stats.columns and row_stats is not None:
            row_stats[name] = stats
        check_length(str(path), len(stream), seq_len)
        check_tokens(stream, embeddings, tokenizer, str(path))
        windows.append(cut_windows(stream, seq_len)[:max_windows].long())
        available.append(len(stream))
    return concat_sources(windows, tuple(paths), available)


def concat_sources(tokens_by_source: Sequence[Tensor], names: Sequence[str], available: Sequence[int]) -> Windows:
    """Concatenates the windows of several sources.

    Args:
        tokens_by_source: int64 [n, seq_len] of each source.
        names: of the sources.
        available: tokens of each source, as in ``Windows.tokens_available``.
    """
    lengths = torch.tensor([len(tokens) for tokens in tokens_by_source])
    source = torch.repeat_interleave(torch.arange(len(tokens_by_source)), lengths)
    return Windows(torch.cat(list(tokens_by_source)), source, tuple(names), tuple(available))
