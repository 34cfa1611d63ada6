"""Windows of tokens: packing, micro-batches, storage, and the evaluation windows.

A window is a run of ``window`` consecutive tokens of one source. Nothing here adds special tokens to a text:
the only ones are the end tokens that separate documents, and those of chat templates.
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

from gemq.calibration.rows import RowReader, Rows, texts_of
from gemq.calibration.texts import holds_rows, json_rows, text_parts
from gemq.calibration.tokens import check_tokens, tokenize_pieces, tokenize_text
from gemq.errors import UserError


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of equal length, those of one source next to each other."""

    tokens: Tensor
    """int64 [N, window]"""
    source: Tensor
    """int64 [N]: index into ``names``"""
    names: tuple[str, ...]
    """Name of each source, unique."""
    tokens_available: tuple[int, ...]
    """Tokens that each source had, whether or not a window took them."""

    def __post_init__(self) -> None:
        assert self.tokens.dtype == self.source.dtype == torch.int64
        assert self.tokens.dim() == 2
        assert self.source.shape == self.tokens.shape[:1]
        assert len(set(self.names)) == len(self.names) == len(self.tokens_available)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def window(self) -> int:
        """Tokens per window."""
        return self.tokens.shape[1]

    def counts(self) -> dict[str, int]:
        """Windows of each source."""
        counted = torch.bincount(self.source, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counted, strict=True))

    def of(self, source: int) -> Windows:
        """The windows of one source, by its index."""
        tokens = self.tokens[self.source == source]
        return from_parts([tokens], [self.names[source]], [self.tokens_available[source]])

    def share(self, tokens: int) -> Windows:
        """Windows of every source, the same share of each and evenly spread over it, with about ``tokens`` tokens in
        all; at least one of each. All windows where they have no more, or for 0."""
        every = self.tokens.numel()
        if not 0 < tokens < every:
            return self
        parts = [self.tokens[self.source == i] for i in range(len(self.names))]
        counts = [max(1, round(len(part) * tokens / every)) for part in parts]
        some = [part[torch.arange(n) * len(part) // n] for part, n in zip(parts, counts, strict=True)]
        return from_parts(some, self.names, self.tokens_available)

    def extended(self, name: str, tokens: Tensor) -> Windows:
        """These windows and more, int64 [n, window], from the source ``name``, which may be among ours already."""
        names = self.names if name in self.names else (*self.names, name)
        parts = [self.tokens[self.source == i] for i in range(len(names))]
        parts[names.index(name)] = torch.cat([parts[names.index(name)], tokens])
        available = [*self.tokens_available, 0][: len(names)]
        available[names.index(name)] += tokens.numel()
        return from_parts(parts, names, available)

    def batches(self, batch_tokens: int) -> Iterator[slice]:
        """Micro-batches as slices of the windows, in stored order.

        ``batch_tokens`` (tokens) alone fixes them, never the memory at hand: sums over micro-batches then
        round the same way wherever a job runs. A batch holds at least one window.
        """
        step = max(1, batch_tokens // self.window)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))

    def to_tensors(self) -> dict[str, Tensor]:
        """``tokens`` and ``source`` as files hold them: int32, on the CPU."""
        tensors = {"tokens": self.tokens, "source": self.source}
        return {name: tensor.to("cpu", torch.int32).contiguous() for name, tensor in tensors.items()}

    def about(self) -> dict[str, Any]:
        """Metadata that files hold in addition to the tensors, as plain values."""
        return {"names": self.names, "tokens_available": self.tokens_available}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Windows:
        """The windows that ``to_tensors`` and ``about`` describe."""
        tokens, source = tensors["tokens"].long(), tensors["source"].long()
        return cls(tokens, source, tuple(about["names"]), tuple(about["tokens_available"]))

    def to_bytes(self) -> bytes:
        """The safetensors file; equal windows give equal bytes."""
        # One metadata key: safetensors writes several in no fixed order.
        return safetensors.torch.save(self.to_tensors(), metadata={"windows": json.dumps(self.about())})

    def digest(self) -> str:
        """SHA-256 of the file's bytes: what a fingerprint of the calibration set is made of."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        """Reads what ``save`` wrote, or a file of windows in a work directory. Either has one metadata key."""
        with safe_open(path, framework="pt") as file:
            (about,) = file.metadata().values()
            tensors = {name: file.get_tensor(name) for name in ("tokens", "source")}
        return cls.from_tensors(tensors, json.loads(about))


def pack_documents(documents: Iterable[Iterable[int]], *, separator: int | None) -> Tensor:
    """Joins documents to one stream int32 [T], the ``separator`` token between two of them unless it is None."""
    stream = array("i")
    for number, document in enumerate(documents):
        if number and separator is not None:
            stream.append(separator)
        stream.extend(document)
    return torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0, dtype=torch.int32)


def file_documents(path: Path, tokenizer: Any, reader: RowReader, rows: Rows) -> Iterator[Iterable[int]]:
    """The token ids of a file's documents: of each row, or of the text as a whole, which is read in parts.

    What was read of rows is counted in ``rows``. Raises UserError for a file that cannot be used.
    """
    if holds_rows(path):
        return (tokenize_text(tokenizer, text) for text in texts_of(json_rows(path), reader, rows, str(path)))
    return iter([chain.from_iterable(tokenize_pieces(tokenizer, text_parts(path)))])


def cut_windows(stream: Tensor, window: int) -> Tensor:
    """Non-overlapping windows [T // window, window] of a stream [T]; the remainder is dropped. A view."""
    count = len(stream) // window
    return stream[: count * window].view(count, window)


def check_length(name: str, tokens: int, window: int) -> None:
    """Raises UserError when a text's ``tokens`` do not fill one window."""
    if tokens < window:
        raise UserError(
            f"{name} has {tokens} tokens, fewer than a window of {window}: give a longer text or a smaller --window"
        )


def eval_windows(
    tokenizer: Any,
    files: Sequence[str | Path],
    window: int,
    max_windows: int | None = None,
    *,
    column: str | None = None,
    embeddings: int | None = None,
    read: dict[str, Rows] | None = None,
) -> Windows:
    """The non-overlapping windows of each file, in order, named by the file's stem.

    A text is tokenized as a whole, rows are joined as for calibration; tokens beyond the last full window are dropped.

    Args:
        max_windows: number of windows to take from the start of each file
        column: whose text to take from rows; None: by the known names
        embeddings: tokens that the model has embeddings for; None: not known
        read: receives by name what was read of those files that have rows

    Raises:
        UserError: a file cannot be used, or two files have one stem
    """
    paths: dict[str, Path] = {}
    for path in map(Path, files):
        if path.stem in paths:
            raise UserError(f"{paths[path.stem]} and {path} share the stem {path.stem!r}: rename one of them")
        paths[path.stem] = path
    if not paths:
        raise UserError("no text to evaluate on: give at least one text file")

    reader = RowReader(tokenizer, column, flag="--text-column")
    windows, available = [], []
    for name, path in paths.items():
        rows = Rows()
        stream = pack_documents(
            file_documents(path, tokenizer, reader, rows), separator=getattr(tokenizer, "eos_token_id", None)
        )
        if rows.columns and read is not None:
            read[name] = rows
        check_length(str(path), len(stream), window)
        check_tokens(stream, embeddings, tokenizer, str(path))
        windows.append(cut_windows(stream, window)[:max_windows].long())
        available.append(len(stream))
    return from_parts(windows, tuple(paths), available)


def from_parts(parts: Sequence[Tensor], names: Sequence[str], available: Sequence[int]) -> Windows:
    """Windows from each source's own int64 [n, window], and the tokens that each had."""
    source = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    return Windows(torch.cat(list(parts)), source, tuple(names), tuple(available))
