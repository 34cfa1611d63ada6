"""Chat templates: conversations as a model was trained to read them, or one line that says why that cannot be.

A template is code that a model brings along. It may raise, want things that a plain conversation does not have, or take
a message's content as a list of parts, as models that also see do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemq.runtime.fallbacks import first_line

Message = Mapping[str, Any]
"""``role``, ``content`` (a string), and whatever else the template may read."""

FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2024{%- endmacro -%}"
"""Goes before a chat template: some write today's date, on which calibration must not depend."""


class CannotRender(Exception):
    """The template could not be applied to a conversation; the message says why."""


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message], *, answer: bool = False, fixed_date: bool = False) -> str:
    """The text of a conversation by the tokenizer's chat template, special tokens included.

    Args:
        answer: end with what opens the assistant's answer
        fixed_date: put a fixed date in place of today's

    Raises:
        CannotRender: the template raises, is missing, or leaves out what a user says
    """
    named = getattr(tokenizer, "chat_template", None)
    if isinstance(named, dict) and "default" not in named:
        raise CannotRender(f"none of its templates is the default: {', '.join(sorted(map(str, named)))}")
    reasons = []
    for as_parts in (False, True):
        try:
            text = _applied(tokenizer, messages, as_parts, answer, fixed_date)
            if _holds_users(text, messages):
                return text
            changed = [{**m, "content": f"{m['content']}?"} if m["role"] == "user" else m for m in messages]
            if _applied(tokenizer, changed, as_parts, answer, fixed_date) != text:  # written in another form
                return text
            reasons.append("it leaves out what the user says")
        except Exception as error:  # noqa: BLE001 - a template is code of other people
            reasons.append(first_line(error))
    raise CannotRender(reasons[0])


class ChatOpening(NamedTuple):
    """What a template writes around the first message of a user, as token ids. Empty where it cannot be applied."""

    user: list[int]
    """What stands before the user's message."""
    answer: list[int]
    """What stands between the user's message and the answer."""


def chat_opening(tokenizer: Any) -> ChatOpening:
    """What the chat template writes around a user's message; empty when there is none or it cannot render one."""
    message = "gemq-user-message"
    try:
        text = render(tokenizer, [{"role": "user", "content": message}], answer=True, fixed_date=True)
    except CannotRender:
        return ChatOpening([], [])
    user, found, answer = text.partition(message)
    if not found:
        return ChatOpening([], [])
    encode = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
    return ChatOpening(encode(user), encode(answer))


def _applied(tokenizer: Any, messages: Sequence[Message], as_parts: bool, answer: bool, fixed_date: bool) -> str:
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        [_in_parts(message) for message in messages] if as_parts else [dict(message) for message in messages],
        chat_template=FIXED_DATE + template if fixed_date else template,
        tokenize=False,
        add_generation_prompt=answer,
    )


def _in_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _holds_users(text: str, messages: Sequence[Message]) -> bool:
    """Whether a text holds what users say, whatever became of spaces and line ends."""
    squeezed = "".join(text.split())
    return all("".join(m["content"].split()) in squeezed for m in messages if m["role"] == "user")
