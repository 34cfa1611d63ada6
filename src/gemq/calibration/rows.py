"""Extracts the text of a row: a column of text, a conversation, or a prompt with its response.

Conversations go through the model's chat template, if it has one. Columns are recognised by the names below. A row
without any of them is refused rather than guessed at.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gemq.errors import UserError
from gemq.models.chat_template import CannotRender, Message, has_template, render

TEXT = "text"
OTHER_TEXTS = ("content", "body", "document")
"""Used if a row has no text in any of the other columns."""
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
PROMPT_CONTEXTS = ("input", "context")
"""Additional text of a prompt, in a column of its own."""
RESPONSES = ("response", "completion", "output", "answer")

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Role names of data sets, and the names that chat templates use for them."""

MAX_EMPTY_ROWS = 10_000
"""Rows without text at the beginning of a data set after which it is refused. A streamed data set may have no end."""

MAX_NAMED_COLUMNS = 12
"""Columns that a message lists."""

PARAGRAPH = "\n\n"
"""Separates the messages of a conversation if there is no chat template."""


@dataclass
class RowStats:
    """Statistics of the rows read from one source.

    Attributes:
        columns: number of rows by the columns that their text comes from, such as ``instruction+input+output``.
        empty: rows without text, which are skipped.
        untemplated: conversations that the chat template could not be applied to.
    """

    columns: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    untemplated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"columns": dict(self.columns), "empty_rows": self.empty, "rows_without_template": self.untemplated}


@dataclass(frozen=True)
class Row:
    """The text or the conversation of a row, and the columns it comes from. Both are empty in a row without text."""

    columns: str
    text: str = ""
    messages: Sequence[Message] = ()


class RowReader:
    """Extracts the text of rows.

    Args:
        tokenizer: of the model, with its chat template.
        column: name of the column to read; None: recognised by the known names.
        flag: the command line flag that sets ``column``, for messages.
    """

    def __init__(self, tokenizer: Any, column: str | None = None, flag: str = "--calibration-column"):
        self._tokenizer, self._column, self._flag = tokenizer, column, flag
        self._has_template = has_template(tokenizer)

    def read(self, value: Any, location: str) -> Row:
        """Finds the text of a row.

        Args:
            value: the row, decoded from JSON or from a data set.
            location: where it comes from, for messages.

        Raises:
            UserError: no column is known to hold text.
        """
        if not isinstance(value, dict):
            raise UserError(f'{location} is not an object: write one object a line, such as {{"text": "..."}}')
        if self._column is not None:
            return self._column_row(value, self._column, location)
        empty_row = None
        for row in self._candidate_rows(value, location):
            if row.text or row.messages:
                return row
            empty_row = empty_row or row
        if empty_row is None:
            self._refuse(value, location)
        return empty_row

    def _candidate_rows(self, value: dict[str, Any], location: str) -> Iterator[Row]:
        """Yields the row as read from each column that may hold its text, the most specific names first."""
        for name in (TEXT, *CONVERSATIONS):
            if name in value:
                yield self._column_row(value, name, location)
        pair = _prompt_and_response(value)
        if pair is not None:
            yield pair
        for name in OTHER_TEXTS:
            if name in value:
                yield self._column_row(value, name, location)

    def _column_row(self, value: dict[str, Any], name: str, location: str) -> Row:
        """The row as read from the column ``name``, which holds text or a conversation."""
        if name not in value:
            raise UserError(
                f"{location} has no column {_printable(name)}: give {self._flag} one of {_list_columns(value)}"
            )
        content = value[name]
        if content is None or content == []:
            return Row(name)
        if isinstance(content, str):
            messages = _parse_json_messages(content)
            if messages:
                return Row(name, messages=messages)
            return Row(name, text=content if content.strip() else "")
        messages = _parse_messages(content)
        if messages is None:
            raise UserError(
                f"{location} has neither text nor messages in its column {_printable(name)}: name another one with "
                f"{self._flag} (it has {_list_columns(value)})"
            )
        return Row(name, messages=messages)

    def _refuse(self, value: dict[str, Any], location: str) -> NoReturn:
        """Raises UserError for a row without a known column."""
        columns = _list_columns(value)
        if not any(isinstance(content, str) for content in value.values()):
            raise UserError(f'{location} has no string field: name the text\'s field "text" (it has {columns})')
        raise UserError(
            f"{location} has no column that is known to hold text (text, messages, or a prompt with its response): "
            f"name one with {self._flag} (it has {columns})"
        )

    def text(self, row: Row, stats: RowStats) -> str:
        """The text of a row, empty if it has none. Counts the row in ``stats``."""
        text = row.text
        if row.messages:
            text, has_failed = self._conversation_text(row.messages)
            stats.untemplated += has_failed
        stats.columns[row.columns] += 1
        stats.empty += not text
        return _replace_surrogates(text)

    def _conversation_text(self, messages: Sequence[Message]) -> tuple[str, bool]:
        """The text of a conversation, and whether the chat template failed on it."""
        if self._has_template:
            try:
                text = render(self._tokenizer, messages, fixed_date=True)
            except CannotRender:
                pass
            else:  # packing separates documents by end tokens
                return text.removesuffix(self._tokenizer.eos_token or ""), False
        contents = [message["content"] for message in messages]
        return PARAGRAPH.join(content for content in contents if content.strip()), self._has_template


def row_texts(rows: Iterable[tuple[str, Any]], reader: RowReader, stats: RowStats, source: str) -> Iterator[str]:
    """Yields the texts of a source's rows. Rows without text are skipped.

    Args:
        rows: location of each row, for messages, and its value.
        reader: extracts the text.
        stats: counts the rows.
        source: name of the source, for messages.

    Raises:
        UserError: a row cannot be read, or no row has text.
    """
    has_text, columns = False, ""
    for location, value in rows:
        text = reader.text(reader.read(value, location), stats)
        columns = columns or _list_columns(value)
        if text:
            has_text = True
            yield text
        elif not has_text and stats.empty >= MAX_EMPTY_ROWS:
            break
    if not has_text:
        searched = f" in {' and '.join(stats.columns)}" if stats.columns else ""
        raise UserError(f"{source} has no text{searched} in any of its rows (they have {columns or 'no columns'})")


def _prompt_and_response(value: dict[str, Any]) -> Row | None:
    """A row with a prompt and its response, as messages. None if a row has no such columns."""
    prompt = next((name for name in PROMPTS if name in value), None)
    response = next((name for name in RESPONSES if name in value), None)
    if prompt is None or response is None:
        return None
    systems = [name for name in SYSTEMS if value.get(name)][:1]
    contexts = [name for name in PROMPT_CONTEXTS if name != prompt and value.get(name)]
    messages: list[Message] = [{"role": "system", "content": value[name]} for name in systems]
    for role, columns in (("user", [prompt, *contexts]), ("assistant", [response])):
        role_messages = _role_messages(role, [value[name] for name in columns])
        if role_messages is None:
            return None
        messages += role_messages
    if not all(isinstance(message["content"], str) for message in messages):
        return None
    return Row("+".join([*systems, prompt, *contexts, response]), messages=messages)


def _role_messages(role: str, contents: Sequence[Any]) -> list[Message] | None:
    """The messages of one role. None if the contents are neither texts nor one conversation."""
    contents = [content for content in contents if content is not None]
    if all(isinstance(content, str) for content in contents):
        text = PARAGRAPH.join(content for content in contents if content.strip())
        return [{"role": role, "content": text}] if text else []
    if len(contents) == 1:  # a prompt that is a conversation, which the response continues
        return _parse_messages(contents[0])
    return None


def _parse_messages(value: Any) -> list[Message] | None:
    """A conversation with the usual names of roles and contents, without its empty messages.

    Args:
        value: a list of messages, or, as in some data sets, a dictionary of lists, one item for each message.

    Returns:
        None if ``value`` is not a conversation.
    """
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, message, strict=False)) for message in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages: list[Message] = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = _join_content_items(content)
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        if content and content.strip():
            extra = {key: item for key, item in message.items() if key not in ("role", "from", "content", "value")}
            messages.append({**extra, "role": ROLES.get(role.lower(), role), "content": content})
    return messages


def _join_content_items(items: Sequence[Any]) -> str:
    """The text of a message's content that is a list of items, some of which may be images."""
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    return "".join(text for text in texts if isinstance(text, str))


def _parse_json_messages(text: str) -> list[Message] | None:
    """A conversation that a column holds as JSON. None if the text is not one."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        return _parse_messages(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON may contain and tokenizers refuse."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _list_columns(value: dict[str, Any]) -> str:
    """The names of a row's columns for a message."""
    if not value:
        return "no columns"
    names = ", ".join(_printable(name) for name in list(value)[:MAX_NAMED_COLUMNS])
    omitted = len(value) - MAX_NAMED_COLUMNS
    return f"{names} and {omitted} more" if omitted > 0 else names


def _printable(name: Any) -> str:
    """A name from a file in a form that can be printed."""
    text = str(name)[:40]
    return text if text.isprintable() else repr(text)
