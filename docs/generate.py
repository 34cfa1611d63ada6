"""Writes ``docs/recipe.md`` and ``docs/api.md`` from docstrings. The head of a page, down to ``MARKER``, stays."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import gemq
from gemq.recipe import Recipe
from gemq.recipe_defaults import BUILT_IN, EFFORTS, FROM_EFFORT
from gemq.recipe_values import CHOICES

MARKER = "<!-- The rest is written by docs/generate.py: change the docstrings, then run make docs. -->"
MAX_WIDTH = 119  # of lines outside tables, in characters


def parse_docstring(docstring: str | None) -> tuple[str, dict[str, Any]]:
    """Split a docstring in Google style into its prose and its sections. Arguments and attributes are a dictionary."""
    prose, *parts = re.split(r"^(\w+):\n(?= {4})", inspect.cleandoc(docstring or "") + "\n", flags=re.MULTILINE)
    sections: dict[str, Any] = dict(zip(parts[::2], map(textwrap.dedent, parts[1::2]), strict=True))
    for title in sections.keys() & {"Args", "Attributes"}:
        _, *items = re.split(r"^(\w+): ", sections[title], flags=re.MULTILINE)
        sections[title] = dict(zip(items[::2], items[1::2], strict=True))
    return prose, sections


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring below each attribute that has one."""
    return dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.MULTILINE | re.DOTALL))


def as_markdown(text: str) -> str:
    """Convert the prose of a docstring, whose lists stay as they are."""
    blocks = text.strip().replace("``", "`").split("\n\n")
    fill = textwrap.TextWrapper(MAX_WIDTH, break_on_hyphens=False, break_long_words=False).fill
    return "\n\n".join(block if block.startswith("- ") else fill(" ".join(block.split())) for block in blocks)


def as_cell(text: str) -> str:
    """Convert the prose of a docstring to a cell of a table: one line from a capital to a period."""
    line = " ".join(text.replace("``", "`").replace("|", "\\|").split())
    return line[:1].upper() + line[1:].removesuffix(".") + "."


def code(value: object) -> str:
    """Return a text, or another value as a recipe file has it, in backquotes for a table."""
    text = value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return f"`{text}`".replace("|", "\\|")


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return re.sub(r"  +", " ", "\n".join(f"| {' | '.join(line)} |" for line in lines))


def signature_block(name: str, function: Any) -> str:
    """Return a signature with types and defaults as a block of code, on one line if it fits."""
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    line = name + re.sub(r"\(self(, )?", "(", signature)
    if len(line) > MAX_WIDTH:
        line = re.sub(r", (?=\w+: |\*)", ",\n    ", line).replace("(", "(\n    ", 1).replace(") ->", ",\n) ->")
    return f"```python\n{line}\n```"


def sections_text(sections: dict[str, Any]) -> list[str]:
    """Return a table of the arguments and a paragraph for each other section of a docstring."""
    parts = []
    for title, content in sections.items():
        if title == "Args":
            rows = [[code(name), as_cell(text)] for name, text in content.items()]
            parts.append(table(["argument", "meaning"], rows))
        else:
            parts.append(as_markdown(f"**{title}** {content}"))
    return parts


def function_text(name: str, function: Any) -> list[str]:
    """Return signature, prose and sections of a function or a method, all of whose arguments must be described."""
    prose, sections = parse_docstring(function.__doc__)
    arguments = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    if list(sections.get("Args", {})) != arguments:
        raise SystemExit(f"{name}: describe its arguments in its docstring, in order: {', '.join(arguments)}")
    return [signature_block(name, function), as_markdown(prose), *sections_text(sections)]


def class_text(name: str, cls: type) -> list[str]:
    """Return prose, public attributes and methods of a class. The keys of a recipe have a page of their own."""
    prose, sections = parse_docstring(cls.__doc__)
    texts = attribute_docstrings(cls) | sections.pop("Attributes", {})
    rows, methods = [], []
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) and cls is not Recipe else ():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "" if default is dataclasses.MISSING else code(repr(default))
        rows += [[code(field.name), code(field.type), shown, as_cell(texts[field.name])]] * (field.name[0] != "_")
    for key in [key for key in vars(cls) if not key.startswith("_")]:
        member = getattr(cls, key)
        if isinstance(member, property):
            rows.append([code(key), code(member.fget.__annotations__["return"]), "computed", as_cell(member.__doc__)])
        elif inspect.isroutine(member):
            methods += [f"### {name}.{key}", *function_text(f"{name}.{key}", member)]
    attributes = [table(["attribute", "type", "default", "meaning"], rows)] if rows else []
    return [as_markdown(prose), *sections_text(sections), *attributes, *methods]


def api_page() -> list[str]:
    """Return the public functions, then the public classes."""
    parts, rows = [], []
    for name in sorted(gemq.__all__, key=lambda name: name[0].isupper()):
        member = getattr(gemq, name)
        title, make_text = (f"class {name}", class_text) if isinstance(member, type) else (name, function_text)
        summary = parse_docstring(member.__doc__)[0].split("\n\n")[0]
        rows.append([f"[{title}](#{title.lower().replace(' ', '-')})", as_cell(summary)])
        parts += [f"## {title}", *make_text(f"gemq.{name}", member)]
    return [table(["name", "purpose"], rows), *parts]


def recipe_page() -> list[str]:
    """Return the keys of a recipe by section, the values of each effort, and the built-in recipes."""
    docstrings, parts = attribute_docstrings(Recipe), []
    types = {field.name: str(field.type).partition(" | ")[0] for field in dataclasses.fields(Recipe)}
    for section in re.split(r"^    # ", inspect.getsource(Recipe), flags=re.MULTILINE)[1:]:
        rows = []
        for key in re.findall(r"^    (\w+): .* = ", section, re.MULTILINE):
            kind = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", types[key]).replace("AnyWidth", "width").lower()
            kind = " or ".join(map(code, CHOICES[key])) if key in CHOICES else kind
            default = "by effort" if getattr(Recipe, key) == FROM_EFFORT else code(getattr(Recipe, key))
            rows.append([code(key), kind, default, as_cell(docstrings[key])])
        parts += [f"## {section.splitlines()[0]}", table(["key", "type", "default", "effect"], rows)]
    efforts = [[code(key), *(code(values[key]) for values in EFFORTS.values())] for key in EFFORTS["low"]]
    paper = [[code(key), code(value)] for key, value in BUILT_IN["paper"].items()]
    parts += ["## Values of each effort", table(["key", *map(code, EFFORTS)], efforts)]
    return [*parts, "## Built-in recipe paper", table(["key", "value"], paper)]


def page_text(path: Path) -> str:
    """Return the text that a page should have: its head and the generated rest."""
    head, _, _ = path.read_text(encoding="utf-8").partition(MARKER)
    parts = recipe_page() if path.name == "recipe.md" else api_page()
    return head + "\n\n".join([MARKER, *parts]) + "\n"


if __name__ == "__main__":
    for page in (Path(__file__).with_name("recipe.md"), Path(__file__).with_name("api.md")):
        page.write_text(page_text(page), encoding="utf-8")
