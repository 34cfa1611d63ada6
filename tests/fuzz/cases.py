"""The command line of the fuzzing harness: how many cases of which kind, and one case again.

Each case has a number from which all of it follows, so that a failure can be repeated alone:
``python tests/fuzz/run.py --repeat packed 17``. With ``--jobs 8`` the results are the same, in the same order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fuzz import parallel, worker

KINDS = ("packed", "source", "work")


def run_cases(arguments: Sequence[str]) -> int:
    """Runs what the command line asks for. Returns 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"number of {kind} cases")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--repeat", nargs=2, metavar=("KIND", "NUMBER"), help="one case, with everything that it prints"
    )
    parser.add_argument("--verbose", action="store_true", help="print a line for every case")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes that run cases")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="gemq-fuzz-", ignore_cleanup_errors=True) as folder:
        if options.repeat:
            kind, number = options.repeat[0], int(options.repeat[1])
            damage, outcome = target(kind, Path(folder)).case(number)
            print(f"{kind} {number}: {damage}\n{outcome.kind}: {outcome.detail}")
            return int(outcome.kind in worker.FAILURES)
        failures = 0
        for kind in KINDS:
            if count := getattr(options, kind):
                numbers = range(options.seed, options.seed + count)
                failures += run_kind(kind, Path(folder), numbers, options.jobs, options.verbose)
    return int(failures > 0)


def target(kind: str, folder: Path) -> Any:
    """The object that makes and runs the cases of a kind."""
    folder.mkdir(exist_ok=True)
    if kind == "packed":
        from fuzz.packed import Packed

        return Packed(folder)
    if kind == "source":
        from fuzz.source import Sources

        return Sources(folder)
    from fuzz.work import WorkDirectories

    return WorkDirectories(folder)


def run_kind(kind: str, folder: Path, numbers: range, jobs: int, verbose: bool) -> int:
    """Runs cases, prints failures and totals. Returns the number of failures."""
    totals = Counter[str]()
    begin = time.monotonic()
    with closing(case_results(kind, folder, numbers, jobs)) as results:
        for number, (damage, outcome) in zip(numbers, results, strict=True):
            totals[outcome.kind] += 1
            failed = outcome.kind in worker.FAILURES
            if failed or verbose:
                detail = outcome.detail if failed else outcome.detail[:150]
                print(f"{'FAILED ' if failed else ''}{kind} {number}: {damage}: {outcome.kind}: {detail}", flush=True)
            if totals.total() in (len(numbers), *range(100, len(numbers), 100)):
                counts = ", ".join(f"{count} {kind}" for kind, count in sorted(totals.items()))
                seconds = time.monotonic() - begin
                print(f"{kind}: {totals.total()} cases: {counts} in {seconds:.0f} s", flush=True)
    return sum(totals[kind] for kind in worker.FAILURES)


def case_results(kind: str, folder: Path, numbers: range, jobs: int) -> Generator[parallel.Result]:
    """Yields the results of cases in the order of their numbers."""
    if jobs > 1:
        yield from parallel.run_in_processes(lambda index: target(kind, folder / f"{kind}-{index}"), numbers, jobs)
        return
    cases = target(kind, folder / kind)
    for number in numbers:
        yield cases.case(number)
