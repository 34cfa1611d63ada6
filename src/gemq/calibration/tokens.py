"""From text to token ids. A long text goes through the tokenizer in pieces, cut where that changes no token.

A tokenizer takes some 150 bytes of memory a character while it works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from gemq.errors import UserError

PIECE = 1 << 18
"""Characters that are tokenized at once. A text of no more is never cut."""

CONTEXT = 2048
"""Characters before and behind a cut that are looked at: what lies farther away changes no token at the cut."""

TRIED = 256
"""Places for a cut that are tried at most before a piece is made longer."""


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens, in one go."""
    # verbose: a text longer than the model's context is no mistake here, so no warning of it.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_pieces(tokenizer: Any, parts: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of the text that ``parts`` are one after the other, in order, some at a time.

    The same as ``tokenize_text`` of the whole text.
    """
    context, text, limit = "", "", PIECE
    for part in parts:
        text += part
        while len(text) > limit + CONTEXT:
            found = _cut(tokenizer, context, text, limit)
            if found is None:  # nowhere: look farther
                limit *= 2
                continue
            tokens, end = found
            yield tokens
            context, text, limit = (context + text[:end])[-CONTEXT:], text[end:], PIECE
    yield _behind(tokenizer, context, text)


def _cut(tokenizer: Any, context: str, text: str, limit: int) -> tuple[list[int], int] | None:
    """The tokens of the first part of ``text`` and its length, at most ``limit``. None: it cannot be cut.

    At a cut, the text before it has the same tokens with and without what follows; and seen from ``CONTEXT`` characters
    back, it ends in the same tokens as seen from its beginning.
    """
    for end in _places(text, limit):
        left, right = (context + text[:end])[-CONTEXT:], text[end : end + CONTEXT]
        before = tokenize_text(tokenizer, left)
        if tokenize_text(tokenizer, left + right)[: len(before)] != before:
            continue
        tokens = _behind(tokenizer, context, text[:end])
        tail = len(before) // 2
        if tail and tokens[-tail:] == before[-tail:]:
            return tokens, end
    return None


def _places(text: str, limit: int) -> Iterator[int]:
    """Where to try a cut, the last ones first: before a line that begins with a letter or a sign, then before words."""
    tried = 0
    for sign, offset in (("\n", 1), (" ", 0)):
        end = limit
        while tried < TRIED and (end := text.rfind(sign, 1, end)) > limit // 2:
            if not text[end + 1].isspace() and (offset or not text[end - 1].isspace()):
                tried += 1
                yield end + offset


def _behind(tokenizer: Any, context: str, text: str) -> list[int]:
    """Tokens of ``text``, which follows ``context``."""
    if not context:
        return tokenize_text(tokenizer, text)
    return tokenize_text(tokenizer, context + text)[len(tokenize_text(tokenizer, context)) :]


def check_tokens(tokens: Tensor, rows: int | None, tokenizer: Any, source: str) -> None:
    """Refuses tokens that the model's embedding has no row for, such as added ones of a model that was not resized.

    Args:
        tokens: integers of any shape
        rows: of the embedding; None checks nothing
        source: where the tokens are from, for the message

    Raises:
        UserError: names the first such token
    """
    if rows is None or not tokens.numel() or int(tokens.max()) < rows:
        return
    number = int(tokens[tokens >= rows][0])
    raise UserError(foreign_token(tokenizer.convert_ids_to_tokens(number), number, rows, source))


def foreign_token(token: str, number: int, rows: int, source: str) -> str:
    """The message for a token that the embedding has no row for."""
    return (
        f"{source} holds the token {token!r} (number {number}), and the model's embedding has {rows} rows: give the "
        "tokenizer that belongs to the model, or leave this token out"
    )
