"""Text that is safe to show: names and messages from files may hold terminal escapes, markup and lone surrogates."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, marks that change the direction of text, line separators, surrogates."""


def printable(text: str) -> str:
    """``text`` with everything that a terminal would obey, or cannot show, written as an escape such as ``\\x1b``."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def shortened(text: str, most: int = 2_000) -> str:
    """``text`` without its middle where it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


class SafeConsole(Console):
    """A console that shows every string as it is, printable and without markup, in tables and titles too.

    Styles come from ``style=`` and from ``styled``, never from the contents of a string.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of several styles. Each part is a string, or a string and its style."""
    return Text.assemble(*(printable(p) if isinstance(p, str) else (printable(p[0]), p[1]) for p in parts))
