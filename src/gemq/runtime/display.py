"""Safe display of text: names and messages from files may contain terminal escapes, markup and lone surrogates."""

from __future__ import annotations

import re
from typing import Any

from rich import filesize
from rich.console import Console
from rich.text import Text

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, marks that change the direction of text, line separators, surrogates."""


def printable(text: str) -> str:
    """Return ``text`` with each character that a terminal interprets or cannot show as an escape such as ``\\x1b``."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def shortened(text: str, max_length: int = 2_000) -> str:
    """Return ``text`` without its middle if it is longer than ``max_length`` characters."""
    return text if len(text) <= max_length else f"{text[: max_length // 2]} ... {text[-max_length // 2 :]}"


def size_text(count: float) -> str:
    """Return bytes as ``12.34 MB``."""
    return filesize.decimal(int(count), precision=2)


def duration_text(seconds: float, decimals: int = 0) -> str:
    """Return ``30 s``, ``12 min`` or ``3.5 h``. ``decimals``: of seconds."""
    if seconds < 120:
        return f"{seconds:.{decimals}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class SafeConsole(Console):
    """A console that shows every string literally, without escapes or markup, in tables and titles too.

    Styles come from ``style=`` and from ``styled``, never from the contents of a string.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return ``text`` as it is shown."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


def styled(*fragments: str | tuple[str, str]) -> Text:
    """Return text of several styles. Each fragment is a string, or a string and its style."""
    text = Text()
    for fragment in fragments:
        content, style = (fragment, "") if isinstance(fragment, str) else fragment
        text.append(printable(content), style)
    return text
