"""The tables of docs/accuracy.md, as text."""

from __future__ import annotations

from collections.abc import Iterable

from row_families import is_score_ablation, row_title
from rows import variant_base

OPTIONAL_COLUMNS = (("val_kl_p99", "KL, 99 %"), ("val_top1", "top-1"))
"""Columns that older rows lack, and their titles. A table has those that any of its rows has."""

Row = dict[str, str]
Rows = dict[str, Row]
"""Rows of one model by name."""


def tables(all_models: dict[str, Rows]) -> str:
    """The tables of all models, each followed by the table of its variants with outliers if it has any."""
    sections = []
    for model, rows in all_models.items():
        if variant_base(model) is not None:
            continue
        sections.append(f"### {model}\n\n{_origin(rows)}\n\n{_table(rows)}")
        variants = {name: r for name, r in sorted(all_models.items()) if variant_base(name) == model}
        if lines := _outlier_lines(rows, variants):
            sections.append(f"### {model} with outliers\n\n" + "\n".join(lines))
    return "\n\n".join(sections)


def _outlier_lines(rows: Rows, variants: dict[str, Rows]) -> list[str]:
    """The table of KL with and without outliers, for names that all have; empty if there are none.

    Args:
        rows: of the model without outliers
        variants: rows of its variants, by name of the variant
    """
    names = [name for name in _by_size(rows) if any(name in variant_rows for variant_rows in variants.values())]
    if not names:
        return []
    titles = [variant.rpartition("-outliers")[2] for variant in variants]
    lines = [_line(["", "val KL", *(f"outliers {title}" for title in titles), "ratio"])]
    lines.append("|---" * (len(variants) + 3) + "|")
    for name in names:
        without = float(rows[name]["val_kl"])
        measured = {v: float(r[name]["val_kl"]) for v, r in variants.items() if name in r}
        cells = [f"{measured[variant]:.4f}" if variant in measured else "" for variant in variants]
        ratio = sum(measured.values()) / len(measured) / without
        lines.append(_line([row_title(name), f"{without:.4f}", *cells, f"{ratio:.2f}"]))
    return lines


def _table(rows: Rows) -> str:
    """The table of a model."""
    names = _by_size(rows)
    texts = sorted({text for name in names for text in by_text(rows[name])})
    optional = [(column, title) for column, title in OPTIONAL_COLUMNS if any(rows[n].get(column) for n in names)]
    header = ["", "stored bits", "val KL", *(title for _, title in optional), "inside KL", *texts]
    lines = [_line([*header, "perplexity", "seconds"]), "|---" * (len(header) + 2) + "|"]
    for name in names:
        row = rows[name]
        title, kl = row_title(name), f"{float(row['val_kl']):.4f}"
        lines.append(
            _line(
                [title, f"{float(row['stored_bits']):.3f}", f"**{kl}**" if title.startswith("**") else kl]
                + [_rounded(row.get(column, ""), 3) for column, _ in optional]
                + [f"{float(row['inside_kl']):.4f}"]
                + [f"{by_text(row)[text]:.3f}".removeprefix("0") for text in texts]
                + [f"{float(row['val_perplexity']):.3f}", _rounded(row["seconds"], 0)]
            )
        )
    return "\n".join(lines)


def _by_size(rows: Rows) -> list[str]:
    """Names of the rows of a table: the largest first, and of equal size the one with the lowest KL."""
    again = {name for name in rows if name.removesuffix(" default") in rows.keys() - {name}}  # "assembled 2.0 default"
    shown = [name for name in rows if name not in again and not is_score_ablation(name)]
    return sorted(shown, key=lambda name: (-float(rows[name]["stored_bits"]), float(rows[name]["val_kl"])))


def _rounded(cell: str, digits: int) -> str:
    """A number of a row that may be missing: some evaluations have no such metric, a resumed job no seconds."""
    return f"{float(cell):.{digits}f}" if cell else ""


def by_text(row: Row) -> dict[str, float]:
    """KL by val text."""
    return {name: float(kl) for name, _, kl in (pair.partition("=") for pair in row["kl_by_text"].split())}


def _origin(rows: Rows) -> str:
    """Where the rows were measured: device and versions."""

    def distinct(column: str) -> str:
        return " and ".join(dict.fromkeys(row[column] for row in rows.values()))

    return f"{distinct('device')}, torch {distinct('torch')}, Transformers {distinct('transformers')}."


def _line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"
