"""Checks every family with routed experts that the installed Transformers has (``make conformance``).

It writes the results to ``tests/conformance-results`` and ``docs/families.md`` from the results of all versions there.
With ``--check`` (in CI) it writes nothing, and fails where a result or the page differs from what a run would write.
The check itself is in ``tests/support/family_check.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers

from support.family_check import Outcome, check, families

RESULTS = Path(__file__).parent / "conformance-results"
PAGE = Path(__file__).parent.parent / "docs" / "families.md"


def _run(job: tuple[str, str]) -> Outcome:
    family, model_type = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix=f"gemq-{model_type}-"))
    begin = time.perf_counter()
    try:
        return check(model_type, folder, family)
    except Exception as error:  # noqa: BLE001 (whatever a family does wrong is its result)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return Outcome(family, model_type, "fails", reason, seconds=round(time.perf_counter() - begin, 2))
    finally:
        shutil.rmtree(folder)


def main(names: list[str], check_only: bool = False) -> int:
    """Runs all families, or those named. Returns the number that neither work nor are refused cleanly.

    check_only: write nothing, and count results that differ from those kept, and the page if it does
    """
    jobs = [(f, t) for f, types in families().items() for t in types if not names or {f, t} & set(names)]
    begin = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        outcomes = []
        for outcome in pool.map(_run, jobs):
            outcomes.append(outcome)
            print(f"{outcome.model_type:28} {outcome.status:8} {outcome.seconds:5.1f} s  {outcome.reason}", flush=True)
    counts = {s: sum(o.status == s for o in outcomes) for s in ("works", "refused", "fails")}
    print(f"transformers {transformers.__version__}: {counts} in {time.perf_counter() - begin:.0f} s")
    rows = [{k: v for k, v in asdict(o).items() if k != "seconds"} for o in outcomes]
    results_file = RESULTS / f"{transformers.__version__}.json"
    if check_only:
        return counts["fails"] + _differences(rows, results_file)
    if not names:
        RESULTS.mkdir(exist_ok=True)
        results_file.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(), encoding="utf-8")
    return counts["fails"]


def _differences(rows: list[dict[str, Any]], results_file: Path) -> int:
    """Prints and counts where a run differs from what is kept of this version, and the page from all that is kept."""
    recorded = {row["model_type"]: row for row in json.loads(results_file.read_text())} if results_file.exists() else {}
    current = {row["model_type"]: row for row in rows}
    differences = [
        f"{kind}: {recorded.get(kind, {}).get('status', 'absent')} in {results_file.name}, now "
        f"{current.get(kind, {}).get('status', 'absent')}"
        for kind in sorted(recorded.keys() | current.keys())
        if recorded.get(kind) != current.get(kind)
    ]
    if PAGE.read_text(encoding="utf-8") != page():
        differences.append(f"{PAGE.name} is not what the results kept say")
    for line in differences:
        print(line)
    if differences:
        print("run make conformance, with TRANSFORMERS for the version, and look at what it changes")
    return len(differences)


def page() -> str:
    """``docs/families.md`` from the results of every version of Transformers that was run."""
    files = sorted(RESULTS.glob("*.json"), key=lambda f: [int(number) for number in f.stem.split(".")])
    runs = {f.stem: json.loads(f.read_text()) for f in files}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for version, results in runs.items():
        for row in results:
            rows.setdefault(row["model_type"], {})[version] = row
    counts = {v: sum(r["status"] == "works" for r in results) for v, results in runs.items()}
    folders = {
        v: len({r["family"] for r in results} - {r["family"] for r in results if r["status"] != "works"})
        for v, results in runs.items()
    }
    lines = [
        "# Families",
        "",
        "Written by `make conformance`; do not edit.",
        "",
        "Every family of Transformers with routed experts. A tiny random model of each is saved as on the hub,",
        "quantized (candidates, scores, allocation, reconstruction), written packed, and loaded.",
        "",
        "**Works** means:",
        "",
        "- All routed experts of the language model are packed, and everything else is unchanged to the bit.",
        "- Logits equal those of an ordinary checkpoint that an independent reader made from the packed files. The",
        "  reader follows [the format's description](checkpoint-format.md) alone.",
        "- `model.generate` and `gemq generate` write the same text as that checkpoint.",
        "- `gemq eval --reference` compares the result with the original, and the model writes calibration windows.",
        "",
        "**Refused** means: rejected with one line that says why, before anything is computed or written.",
        "",
        "Of models that also read images or audio, the language model is quantized and the rest is kept unchanged.",
        "",
        *(f"- Transformers {v}: {counts[v]} model types work, {folders[v]} model files in full." for v in runs),
        "",
        f"| model type | {' | '.join(runs)} | router | stays unquantized in the layers |",
        f"| --- | {' | '.join('---' for _ in runs)} | --- | --- |",
    ]
    reasons: dict[str, str] = {}
    for kind, by_version in sorted(rows.items()):
        cells = []
        for version in runs:
            row = by_version.get(version)
            cells.append(row["status"] if row else "-")
            if row and row["reason"]:
                reasons[kind] = row["reason"]
        last = by_version[[version for version in runs if version in by_version][-1]]
        unquantized = ", ".join(f"`{name}`" for name in last["unquantized"])
        lines.append(f"| {kind} | {' | '.join(cells)} | {last['router']} | {unquantized} |")
    lines += ["", "## Why refused", "", *(f"- **{kind}**: {reason}" for kind, reason in reasons.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--check"]
    sys.exit(1 if main(names, check_only="--check" in sys.argv) else 0)
