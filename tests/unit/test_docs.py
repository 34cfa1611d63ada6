"""Links and module paths in the documents name things that exist, and generated pages are up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from gemq.reporting.fallback_texts import FALLBACKS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "lab-log.md"], ids=lambda page: page.name)
def test_paths_of_modules_exist(page: Path) -> None:
    """Of files in backquotes, below the repository or below src/gemq."""
    for path in re.findall(r"`((?:\w[\w.-]*/)+[\w-]+\.(?:py|csv))`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (ROOT / "src" / "gemq" / path).exists(), path


def test_all_fallbacks_are_explained_in_their_own_words() -> None:
    """A user searches the page for the words of the summary."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = tuple(re.findall(r"`([^`]+)`", CODE.sub("", page)))
    assert not [text for text in FALLBACKS.values() if not text.startswith(explained)]


def test_all_pages_are_in_the_index() -> None:
    index = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= index


@pytest.mark.parametrize("name", ["recipe.md", "api.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    """If this fails, run ``make docs``. Each page must have a head that is written by hand."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = ROOT / "docs" / name
    text = page.read_text(encoding="utf-8")
    assert text == generator.page_text(page)
    assert text.startswith("# ")
