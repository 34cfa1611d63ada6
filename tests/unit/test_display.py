"""Names from files cannot steer the terminal, and are shown as they are."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from gemq.runtime.display import SafeConsole, printable, shortened, styled
from gemq.runtime.progress import Monitor


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b]text[/b] :smile: ünïcödé 漢字", "plain [b]text[/b] :smile: ünïcödé 漢字"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("a\rb\x08c\x7fd\x9be", "a\\rb\\x08c\\x7fd\\x9be"),
        ("\ud800", "\\ud800"),
        ("abc\u202edef\u2066\u2028", "abc\\u202edef\\u2066\\u2028"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_shortened():
    assert shortened("x" * 10) == "x" * 10
    assert len(shortened("x" * 10**6)) < 2100


NAMES = ("[/b]", "[v2]", "[/red]", "[link=file:///x]y", "\x1b]0;t\x07", "\ud800", ":smile:")


@pytest.mark.parametrize("name", NAMES)
def test_a_console_prints_every_name(name):
    file = io.StringIO()
    console = SafeConsole(file=file, width=200)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    for text in (name, table, styled((name, "green"), name)):
        console.print(text)
    assert file.getvalue().count(printable(name)) == 6
    assert "\x1b" not in file.getvalue()
    file.getvalue().encode("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_bar_shows_every_name(name):
    file = io.StringIO()
    with Monitor(SafeConsole(file=file, width=200, force_terminal=False)).stage(name, 1) as tick:
        tick()
    assert printable(name) in file.getvalue()
