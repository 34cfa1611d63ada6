"""The rows of a measurement survive a new column, and the page says what the newest rows say."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import accuracy_report
from gemq.quant.widths import Width
from record import append, read
from rows import allocation_text, allocation_widths, variant_name


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


def test_report_shows_how_many_times_kl_is_that_of_the_model_without_outliers(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.csv", tmp_path / "accuracy.md"
    append(file, row("gemq 2.0", 0.1) | {"val_top1": "0.91"})
    append(file, row("plain uniform 2", 0.2) | {"seconds": ""})  # of a resumed job
    append(file, row("plain uniform 3", 0.05, bits=3))
    for seed, kl in ((0, 0.3), (1, 0.5)):
        append(file, row("gemq 2.0", kl) | {"model": variant_name("small", seed, 0)})
    append(file, row("plain uniform 2", 0.8) | {"model": variant_name("small", 1, 0)})
    page.write_text("<!-- table -->\n<!-- /table -->\n")
    accuracy_report.report(file, tmp_path)
    originals, _, outliers = page.read_text().partition("### small with outliers\n\n")
    assert [line for line in originals.splitlines() if "2.125" in line] == [
        "| **gemq 2.0** | 2.125 | **0.1000** | 0.910 | 0.1000 | .250 | .500 | 10.000 | 7 |",
        "| plain uniform 2 | 2.125 | 0.2000 |  | 0.1000 | .250 | .500 | 10.000 |  |",
    ]
    assert outliers.splitlines()[:4] == [
        "|  | val KL | outliers 0 | outliers 1 | ratio |",
        "|---|---|---|---|---|",
        "| **gemq 2.0** | 0.1000 | 0.3000 | 0.5000 | 4.00 |",
        "| plain uniform 2 | 0.2000 |  | 0.8000 | 4.00 |",
    ]


def append_numbers(file: Path, column: str) -> None:
    for i in range(50):
        append(file, {column: i})


def test_processes_append_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_numbers, args=(file, f"column {i}")) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    rows = read(file)
    for i in range(3):
        cells = [cells[f"column {i}"] for cells in rows if cells[f"column {i}"]]
        assert cells == [str(number) for number in range(50)]
    assert len(rows) == 150
