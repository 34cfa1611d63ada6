"""Checks every family with routed experts that the installed Transformers has (``make conformance``).

It writes the results to ``tests/conformance-results`` and ``docs/families.md`` from the results of all versions there.
With ``--check`` (in CI) it writes nothing, and fails where a result or the page differs from what a run would write.
With ``--sample`` it checks model types of different kinds alone: see ``sample_of``.
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

from support.families import FAMILIES, KINDS, REFUSED_KINDS
from support.family_check import Outcome, check, families

RESULTS = Path(__file__).parent / "conformance-results"
PAGE = Path(__file__).parent.parent / "docs" / "families.md"


def _run(job: tuple[str, str]) -> Outcome:
    family, model_type = job
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # no result depends on a power cut
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


def sample_of(version: str) -> list[str]:
    """Model types of different kinds, for a release of Transformers that is not run in full.

    - what ``support/families.py`` names: families that gemq promises, and one for everything that sets families apart
    - every model type whose result differs from that in the newest release
    - of model types that agree in status, router and unquantized weights, the first, if none is in the sample yet
    """
    results = _recorded(version)
    newest = _recorded(max((file.stem for file in RESULTS.glob("*.json")), key=_numbers))
    named = [kind for kind in (*FAMILIES, *KINDS, *REFUSED_KINDS) if kind in results]
    changed = [kind for kind in results if _signature(results[kind]) != _signature(newest.get(kind, {}))]
    sample = {kind: None for kind in (*named, *changed)}
    covered = {_signature(results[kind]) for kind in sample}
    for kind, row in results.items():
        if _signature(row) not in covered:
            sample[kind] = None
            covered.add(_signature(row))
    return list(sample)


def _signature(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("status"), row.get("router"), *row.get("unquantized", ())


def _recorded(version: str) -> dict[str, dict[str, Any]]:
    """The results kept of a version of Transformers, by model type."""
    file = RESULTS / f"{version}.json"
    return {row["model_type"]: row for row in json.loads(file.read_text())} if file.exists() else {}


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def main(names: list[str], check_only: bool = False, sample_only: bool = False) -> int:
    """Runs all families, or those named. Returns the number that neither work nor are refused cleanly.

    check_only: write nothing, and count results that differ from those kept, and the page if it does
    sample_only: run the model types of ``sample_of`` alone
    """
    jobs = [(f, t) for f, types in families().items() for t in types]
    installed = {model_type for _, model_type in jobs}
    if names:
        jobs = [(family, kind) for family, kind in jobs if {family, kind} & set(names)]
    if sample_only:
        sample = sample_of(transformers.__version__)
        jobs = [(family, kind) for family, kind in jobs if kind in sample]
    begin = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        outcomes = []
        for outcome in pool.map(_run, jobs):
            outcomes.append(outcome)
            print(f"{outcome.model_type:28} {outcome.status:8} {outcome.seconds:5.1f} s  {outcome.reason}", flush=True)
    counts = {s: sum(o.status == s for o in outcomes) for s in ("works", "refused", "fails")}
    print(f"transformers {transformers.__version__}: {counts} in {time.perf_counter() - begin:.0f} s")
    rows = [{k: v for k, v in asdict(o).items() if k != "seconds"} for o in outcomes]
    if check_only:
        return counts["fails"] + _differences(rows, installed)
    if not names and not sample_only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{transformers.__version__}.json").write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(page(), encoding="utf-8")
    return counts["fails"]


def _differences(rows: list[dict[str, Any]], installed: set[str]) -> int:
    """Prints and counts where a run differs from what is kept of this version, and the page from all that is kept.

    installed: the model types that the installed Transformers has, run or not
    """
    version = transformers.__version__
    recorded, current = _recorded(version), {row["model_type"]: row for row in rows}
    differences = [f"{kind}: in {version}.json, and no longer known" for kind in sorted(recorded.keys() - installed)]
    differences += [f"{kind}: absent in {version}.json" for kind in sorted(installed - recorded.keys())]
    differences += [
        f"{kind}: {recorded[kind]['status']} in {version}.json, now {current[kind]['status']}"
        for kind in sorted(recorded.keys() & current.keys())
        if recorded[kind] != current[kind]
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
    files = sorted(RESULTS.glob("*.json"), key=lambda file: _numbers(file.stem))
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
    options = {"--check", "--sample"} & set(sys.argv)
    names = [argument for argument in sys.argv[1:] if argument not in options]
    sys.exit(1 if main(names, "--check" in options, "--sample" in options) else 0)
