"""Chat templates: conversations as text in the form that a model was trained on.

A template is code that comes with a model. It may raise, need variables that a plain conversation does not have, or
take the content of a message as a list, as templates of multimodal models do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gemq.runtime.fallbacks import first_line

Message = Mapping[str, Any]
"""``role``, ``content`` (a string), and other keys that the template may read."""

FIXED_DATE = "{%- macro strftime_now(format) -%}01 Jan 2024{%- endmacro -%}"
"""Goes before a chat template, since some write today's date, on which calibration must not depend."""


class CannotRender(Exception):
    """The template could not be applied to a conversation. The message says why."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: Sequence[Message], *, answer: bool = False, fixed_date: bool = False) -> str:
    """Applies the tokenizer's chat template to a conversation.

    The content of the messages is passed as strings, or as lists if the template does not support strings.

    Args:
        tokenizer: of the model
        messages: of the conversation
        answer: whether the text ends with the beginning of the assistant's answer
        fixed_date: whether the text contains a fixed date in place of today's

    Returns:
        The text, including special tokens.

    Raises:
        CannotRender: the template raises, is missing, or omits the user's messages.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if isinstance(templates, dict) and "default" not in templates:
        raise CannotRender(f"none of its templates is the default: {', '.join(sorted(map(str, templates)))}")
    reasons = []
    for as_list in (False, True):
        try:
            text = _apply(tokenizer, messages, as_list, answer, fixed_date)
            if _contains_user_messages(text, messages):
                return text
            # The template may change the messages, such as their case. Then other messages give another text.
            changed = [_with_changed_user(message) for message in messages]
            if _apply(tokenizer, changed, as_list, answer, fixed_date) != text:
                return text
            reasons.append("it leaves out what the user says")
        except Exception as error:  # noqa: BLE001 - the template is code of the model
            reasons.append(first_line(error))
    raise CannotRender(reasons[0])


class ChatOpening(NamedTuple):
    """Token ids around the first user message of a conversation. Both are empty if there is no usable template.

    Attributes:
        user: before the user message
        answer: between the user message and the answer
    """

    user: list[int]
    answer: list[int]


def chat_opening(tokenizer: Any) -> ChatOpening:
    """Returns what the tokenizer's chat template writes around a user message."""
    message = "gemq-user-message"
    try:
        text = render(tokenizer, [{"role": "user", "content": message}], answer=True, fixed_date=True)
    except CannotRender:
        return ChatOpening([], [])
    if message not in text:
        return ChatOpening([], [])
    user, _, answer = text.partition(message)
    return ChatOpening(_token_ids(tokenizer, user), _token_ids(tokenizer, answer))


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenizes a text without adding special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _apply(tokenizer: Any, messages: Sequence[Message], as_list: bool, answer: bool, fixed_date: bool) -> str:
    """Applies the template once. ``as_list``: whether it receives the content of a message as a list."""
    template = tokenizer.get_chat_template()
    conversation = [_with_list_content(message) if as_list else dict(message) for message in messages]
    return tokenizer.apply_chat_template(
        conversation,
        chat_template=FIXED_DATE + template if fixed_date else template,
        tokenize=False,
        add_generation_prompt=answer,
    )


def _with_list_content(message: Message) -> dict[str, Any]:
    """Returns a message whose content is a list, as templates of multimodal models expect it."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_changed_user(message: Message) -> Message:
    """Returns a message with another content if it is a user's."""
    return {**message, "content": f"{message['content']}?"} if message["role"] == "user" else message


def _contains_user_messages(text: str, messages: Sequence[Message]) -> bool:
    """Whether a text contains the messages of users, ignoring white space."""
    squeezed = "".join(text.split())
    for message in messages:
        if message["role"] == "user" and "".join(message["content"].split()) not in squeezed:
            return False
    return True
