"""The rows of a measurement survive a new column, and the page says what the newest rows say."""

from __future__ import annotations

from pathlib import Path

import accuracy_report
from gemq.quant.widths import Width
from record import append, read
from rows import allocation_text, allocation_widths


def row(name: str, kl: float, bits: float = 2.0, **columns: str) -> dict[str, str]:
    return {
        "name": name,
        "model": "small",
        "stored_bits": str(bits + 0.125),
        "bytes": str(int(1e6 * bits)),
        "val_kl": str(kl),
        "val_perplexity": "10",
        "inside_kl": "0.1",
        "kl_by_text": "c=0.25 prose=0.5",
        "widths": "1:2 2:4",
        "seconds": "7.4",
        "device": "a GPU",
        "torch": "2",
        "transformers": "5",
        **columns,
    }


def test_a_new_column_leaves_older_rows_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    append(file, {"name": "old", "note": 'with, comma and "quotes"', "dropped": "1"})
    numbers = [[(1, 1), (1.6, 3), (2, 2)], [(3, 3), (2, 1.6), (2, 2)]]
    layers = [[(Width(gate_up), Width(down)) for gate_up, down in layer] for layer in numbers]
    append(file, {"name": "new", "allocation": allocation_text(layers), "note": ""})
    append(file, {"name": "newer", "note": "x"})
    old, new, newer = read(file)
    assert old == {"name": "old", "allocation": "", "note": 'with, comma and "quotes"', "dropped": "1"}
    assert (new["dropped"], allocation_widths(new["allocation"])) == ("", layers)
    assert (newer["note"], newer["allocation"]) == ("x", "")


def test_report(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.csv", tmp_path / "accuracy.md"
    for cells in (
        row("gemq 2.0", 0.9),
        row("plain uniform 2", 0.2),
        row("gemq 2.0", 0.1),
        row("gemq 2.0 (tried)", 0.3),
    ):
        append(file, cells)
    append(file, row("gemq 1.5", 0.4, bits=1.5))
    append(file, row("assembled 2.0 smoothing 8", 0.7))
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    written = accuracy_report.report(file, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n")
    assert text.endswith("\n<!-- /table -->\nafter\n")
    assert [line for line in text.splitlines() if line.startswith("| ")][1:] == [
        "| **gemq 2.0** | 2.125 | **0.1000** | 0.1000 | .250 | .500 | 10.000 | 7 |",
        "| plain uniform 2 | 2.125 | 0.2000 | 0.1000 | .250 | .500 | 10.000 | 7 |",
        "| **gemq 1.5** | 1.625 | **0.4000** | 0.1000 | .250 | .500 | 10.000 | 7 |",
    ]
    figures = [path.read_bytes() for path in written[1:]]
    # With each expert's width known there is another figure; the same rows again change nothing.
    for bits in ("2.0", "1.5"):
        append(file, row(f"gemq {bits}", 0.1, float(bits), allocation="1 2 2/2 2 1"))
    accuracy_report.report(file, tmp_path)
    by_expert = [path.read_bytes() for path in written[1:]]
    assert by_expert[1] != figures[1]
    accuracy_report.report(file, tmp_path)
    assert [path.read_bytes() for path in written[1:]] == by_expert
