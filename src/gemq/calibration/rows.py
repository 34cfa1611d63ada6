"""The text of a row: of a column of text, of a conversation, or of a prompt with its response.

Conversations go through the model's chat template, if it has one. What a row offers is never guessed: a row whose
columns have none of the names below is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemq.errors import UserError
from gemq.models.chat_template import CannotRender, Message, has_template, render

TEXT = "text"
OTHER_TEXTS = ("content", "body", "document")
"""Taken where a row has nothing of the rest."""
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
ADDED = ("input", "context")
"""What an instruction may be about, in a column of its own."""
RESPONSES = ("response", "completion", "output", "answer")

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names of roles that templates know by another one."""

MOST_EMPTY = 10_000
"""Rows without text at the beginning of a data set, which may have no end, after which it is given up."""

MOST_NAMED = 12
"""Columns that a message names."""

PARAGRAPH = "\n\n"
"""Between the parts of a conversation where there is no chat template."""


@dataclass
class Rows:
    """What was read of a source that has rows.

    columns: rows by the columns that their text is from, such as ``instruction+input+output``
    empty: rows without text, which are left out
    untemplated: conversations that the chat template could not be applied to
    """

    columns: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    untemplated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"columns": dict(self.columns), "empty_rows": self.empty, "rows_without_template": self.untemplated}


@dataclass(frozen=True)
class Row:
    """A row's text or conversation, and the columns that it is from. Without text, both are empty."""

    columns: str
    text: str = ""
    messages: Sequence[Message] = ()


class RowReader:
    """Takes the text out of rows.

    column: whose text to take; None: by the known names
    flag:   which names a column, for messages
    """

    def __init__(self, tokenizer: Any, column: str | None = None, flag: str = "--calib-column"):
        self._tokenizer, self._column, self._flag = tokenizer, column, flag
        self._templated = has_template(tokenizer)

    def read(self, value: Any, where: str) -> Row:
        """The row ``value``, decoded from JSON or of a data set. Raises UserError when it has no text that is known."""
        if not isinstance(value, dict):
            raise UserError(f'{where} is not an object: write one object a line, such as {{"text": "..."}}')
        if self._column is not None:
            return self._of_column(value, self._column, where)
        empty = None
        for name in (TEXT, *CONVERSATIONS, None, *OTHER_TEXTS):
            row = _of_pair(value) if name is None else self._of_column(value, name, where) if name in value else None
            if row is not None and (row.text or row.messages):
                return row
            empty = empty or row
        return empty or self._refuse(value, where)

    def _of_column(self, value: dict[str, Any], name: str, where: str) -> Row:
        if name not in value:
            raise UserError(f"{where} has no column {_shown(name)}: give {self._flag} one of {_columns(value)}")
        content = value[name]
        if content is None or content == []:
            return Row(name)
        if isinstance(content, str) and (messages := _written_messages(content)):
            return Row(name, messages=messages)
        if isinstance(content, str):
            return Row(name, text=content if content.strip() else "")
        messages = _messages(content)
        if messages is None:
            raise UserError(
                f"{where} has neither text nor messages in its column {_shown(name)}: name another one with "
                f"{self._flag} (it has {_columns(value)})"
            )
        return Row(name, messages=messages)

    def _refuse(self, value: dict[str, Any], where: str) -> Row:
        if not any(isinstance(content, str) for content in value.values()):
            raise UserError(f'{where} has no string field: name the text\'s field "text" (it has {_columns(value)})')
        raise UserError(
            f"{where} has no column that is known to hold text (text, messages, or a prompt with its response): name "
            f"one with {self._flag} (it has {_columns(value)})"
        )

    def text(self, row: Row, rows: Rows) -> str:
        """The text of a row, empty if it has none; what became of it is counted in ``rows``."""
        text = row.text
        if row.messages:
            text, templated = self._conversation(row.messages)
            rows.untemplated += not templated
        rows.columns[row.columns] += 1
        rows.empty += not text
        return _whole_characters(text)

    def _conversation(self, messages: Sequence[Message]) -> tuple[str, bool]:
        """A conversation's text, and whether the template could be applied; True where there is none."""
        if self._templated:
            try:
                text = render(self._tokenizer, messages, fixed_date=True)
            except CannotRender:
                pass
            else:  # documents are separated by end tokens anyway
                return text.removesuffix(self._tokenizer.eos_token or ""), True
        return PARAGRAPH.join(m["content"] for m in messages if m["content"].strip()), not self._templated


def texts_of(rows: Iterator[tuple[str, Any]], reader: RowReader, read: Rows, source: str) -> Iterator[str]:
    """The texts of a source's rows, those without text left out.

    Raises:
        UserError: a row cannot be read, or none has text
    """
    found, columns = 0, ""
    for where, value in rows:
        text = reader.text(reader.read(value, where), read)
        columns = columns or _columns(value)
        if text:
            found += 1
            yield text
        elif not found and read.empty >= MOST_EMPTY:
            break
    if not found:
        used = f" in {' and '.join(read.columns)}" if read.columns else ""
        raise UserError(f"{source} has no text{used} in any of its rows (they have {columns or 'no columns'})")


def _of_pair(value: dict[str, Any]) -> Row | None:
    """A prompt with its response, as messages. None where a row has no such columns."""
    prompt = next((name for name in PROMPTS if name in value), None)
    response = next((name for name in RESPONSES if name in value), None)
    if prompt is None or response is None:
        return None
    names = [name for name in SYSTEMS if value.get(name)][:1]
    added = [name for name in ADDED if name != prompt and value.get(name)]
    parts: list[Message] = [{"role": "system", "content": value[name]} for name in names]
    for role, columns in (("user", [prompt, *added]), ("assistant", [response])):
        contents = [value[name] for name in columns if value[name] is not None]
        if all(isinstance(content, str) for content in contents):
            text = PARAGRAPH.join(content for content in contents if content.strip())
            parts += [{"role": role, "content": text}] if text else []
        elif len(contents) == 1 and (messages := _messages(contents[0])) is not None:
            parts += messages  # conversations, of which the response is the end
        else:
            return None
    if not all(isinstance(part["content"], str) for part in parts):
        return None
    return Row("+".join([*names, prompt, *added, response]), messages=parts)


def _messages(value: Any) -> list[Message] | None:
    """A conversation by the usual names of roles and contents, without empty messages. None: it is none.

    A list of messages, or, as some data sets give them, lists of all roles and of all contents.
    """
    if isinstance(value, dict) and value and all(isinstance(content, list) for content in value.values()):
        value = [dict(zip(value, message, strict=False)) for message in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages: list[Message] = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which some may be images
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        if content and content.strip():
            more = {key: kept for key, kept in message.items() if key not in ("role", "from", "content", "value")}
            messages.append({**more, "role": ROLES.get(role.lower(), role), "content": content})
    return messages


def _written_messages(text: str) -> list[Message] | None:
    """A conversation that a column holds as JSON. None: the text is none."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        return _messages(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _whole_characters(text: str) -> str:
    """JSON may hold halves of characters, which no tokenizer takes."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _columns(value: dict[str, Any]) -> str:
    names = [_shown(name) for name in value]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more if names else "no columns"


def _shown(name: Any) -> str:
    """A name from a file, as it can be printed."""
    text = str(name)[:40]
    return text if text.isprintable() else repr(text)
