"""A hundred interruptions of jobs with all stages on, of four kinds; run by hand, in CI ``test_resume.py`` does less.

    python tests/e2e/many_kills.py /mnt/small [--rounds 25] [--seed 0]

Each round begins a job anew and ends it by SIGKILL, SIGTERM, SIGINT and a full disk, in random order and at random
moments, resumes it after each, and compares every byte of output and work directory with those of a job that was left
alone. The directory must lie on a file system that may be filled up, such as ``mount -t tmpfs -o size=200m``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gemq.assets import builtin_texts
from support.cli import make_tiny_model
from support.killer import Killer, KillServer

RECIPE = {
    "effort": "low",
    "num_windows": 4,
    "seq_len": 8,
    "micro_batch_tokens": 16,
    "calibration": [str(builtin_texts()[0]), "self"],
    "progressive": [2.5, 2.0],
    "candidate_epochs": 1,
    "reconstruction_epochs": 1,
    "distill_epochs": 1,
    "total_tokens": 64,
}
KINDS: dict[str, int | None] = {
    "SIGKILL": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    "full disk": None,
}


@contextlib.contextmanager
def almost_full(directory: Path, left: int):
    """Leaves so many bytes of the disk free."""
    ballast = directory / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(directory).free - left))
    try:
        yield
    finally:
        ballast.unlink()


def interrupt(killer: Killer, name: str, kind: str, resume: bool, draw: random.Random, needed: int) -> int:
    """Runs a job and ends it. Returns its exit code, 0 if it was done before."""
    number = KINDS[kind]
    if number is not None:
        ended = killer.run(name, resume=resume, delay=draw.uniform(0.02, 1.0) * killer.seconds, signal=number)
        assert ended["code"] in (0, -number), ended
        return ended["code"]
    with almost_full(killer.base, draw.randrange(4096, needed)):
        ended = killer.run(name, resume=resume)
    assert ended["code"] in (0, 2), ended
    if ended["code"] == 2:
        words = ("disk is full", "its disk has", "do not fit")
        assert any(word in ended["error"] for word in words), ended
    return ended["code"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="on a file system that may be filled up")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    args = parser.parse_args()
    draw = random.Random(args.seed)
    model = make_tiny_model(args.directory / "model")
    ended: Counter[str] = Counter()
    with contextlib.closing(KillServer()) as server:
        killer = Killer(server, model, args.directory, RECIPE)
        shutil.rmtree(args.directory / "timed")
        shutil.rmtree(args.directory / "timed.work")
        needed = sum(f.stat().st_size for f in (args.directory / "expected.work").rglob("*") if f.is_file())
        for number in range(args.rounds):
            name, kinds = f"round-{number}", draw.sample(list(KINDS), len(KINDS))
            for kind in kinds:
                resume = (args.directory / f"{name}.work").exists()
                while interrupt(killer, name, kind, resume, draw, needed) == 0:  # it was done before
                    shutil.rmtree(args.directory / name)
                    shutil.rmtree(args.directory / f"{name}.work")
                    resume = False
                ended[kind] += 1
            killer.finish(name, f"seed {args.seed}, round {number}")
            print(f"round {number + 1} of {args.rounds}: {dict(ended)}, the same bytes", flush=True)
    print(f"{ended.total()} interruptions ({dict(ended)}), seed {args.seed}: the same bytes each time")


if __name__ == "__main__":
    main()
