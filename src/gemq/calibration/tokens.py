"""Tokenizes texts. Long texts are tokenized in pieces, cut at positions where this does not change any token.

A tokenizer takes about 150 bytes of memory for each character of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from gemq.errors import UserError

PIECE = 1 << 18
"""Characters of a piece. Texts up to this length are never cut."""

CONTEXT = 2048
"""Characters on each side of a cut that may influence the tokens at the cut."""

MAX_CUT_ATTEMPTS = 256
"""Positions tried as a cut before the piece is made longer."""


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens, in one call of the tokenizer."""
    # verbose=False: no warning for texts that are longer than the model's context
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenize_pieces(tokenizer: Any, chunks: Iterable[str]) -> Iterator[list[int]]:
    """Yields the token ids of a long text in several lists.

    Together they equal ``tokenize_text`` of the whole text.

    Args:
        tokenizer: of the model.
        chunks: consecutive chunks of the text.
    """
    context, text, max_length = "", "", PIECE
    for chunk in chunks:
        text += chunk
        while len(text) > max_length + CONTEXT:
            piece = _cut_piece(tokenizer, context, text, max_length)
            if piece is None:
                max_length *= 2
                continue
            tokens, end = piece
            yield tokens
            context, text, max_length = (context + text[:end])[-CONTEXT:], text[end:], PIECE
    yield _tokenize_after(tokenizer, context, text)


def _cut_piece(tokenizer: Any, context: str, text: str, max_length: int) -> tuple[list[int], int] | None:
    """Cuts the first piece from ``text``.

    A cut is allowed if the text before it has the same tokens with and without the text that follows, and if it ends in
    the same tokens with all of its context and with ``CONTEXT`` characters of it.

    Args:
        tokenizer: of the model.
        context: the characters before ``text``.
        text: the text to cut.
        max_length: upper bound for the length of the piece.

    Returns:
        The tokens of the piece and its length in characters. None if there is no allowed cut.
    """
    for end in _cut_candidates(text, max_length):
        left = (context + text[:end])[-CONTEXT:]
        right = text[end : end + CONTEXT]
        left_tokens = tokenize_text(tokenizer, left)
        if tokenize_text(tokenizer, left + right)[: len(left_tokens)] != left_tokens:
            continue
        tokens = _tokenize_after(tokenizer, context, text[:end])
        tail = len(left_tokens) // 2
        if tail and tokens[-tail:] == left_tokens[-tail:]:
            return tokens, end
    return None


def _cut_candidates(text: str, max_length: int) -> Iterator[int]:
    """Yields positions to try as a cut, the last ones first: starts of lines that are not indented, then of words."""
    attempts = 0
    for separator, offset in (("\n", 1), (" ", 0)):
        end = text.rfind(separator, 1, max_length)
        while attempts < MAX_CUT_ATTEMPTS and end > max_length // 2:
            is_word_start = not text[end + 1].isspace()
            if is_word_start and (separator == "\n" or not text[end - 1].isspace()):
                attempts += 1
                yield end + offset
            end = text.rfind(separator, 1, end)


def _tokenize_after(tokenizer: Any, context: str, text: str) -> list[int]:
    """Tokens of ``text``, which follows ``context``."""
    if not context:
        return tokenize_text(tokenizer, text)
    context_tokens = tokenize_text(tokenizer, context)
    return tokenize_text(tokenizer, context + text)[len(context_tokens) :]


def check_tokens(tokens: Tensor, rows: int | None, tokenizer: Any, source: str) -> None:
    """Checks that the model has an embedding for each token.

    Tokens without one occur if tokens were added to a tokenizer and the model was not resized.

    Args:
        tokens: integers of any shape.
        rows: of the model's embedding; None skips the check.
        tokenizer: of the model.
        source: where the tokens come from, for the message.

    Raises:
        UserError: names the first token without an embedding.
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
