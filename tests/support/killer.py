"""Runs jobs in child processes, kills them, and compares what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.cli import contents


class KillServer:
    """The process that starts jobs and kills them: see ``kill_server.py``."""

    def __init__(self) -> None:
        search_path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.kill_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search_path)},
        )

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


class Killer:
    """A job that can be killed, and what it writes if it is left alone."""

    def __init__(
        self, server: KillServer, model: Path, base: Path, recipe: dict[str, Any], host_memory: int | None = None
    ):
        self.server, self.model, self.base, self.recipe, self.host_memory = server, model, base, recipe, host_memory
        self.expected = self.run("expected", resume=False)
        assert self.expected["code"] == 0, self.expected
        begin, again = time.perf_counter(), self.run("timed", resume=False)
        self.seconds = time.perf_counter() - begin
        assert again["calls"] == self.expected["calls"]
        self.bytes = contents(base / "expected")
        assert contents(base / "timed") == self.bytes

    def run(self, name: str, *, resume: bool, **death: Any) -> dict[str, Any]:
        out, work = str(self.base / name), str(self.base / f"{name}.work")
        request = {"model": str(self.model), "recipe": self.recipe, "out": out, "work": work, "resume": resume}
        return self.server.answer({**request, "host_memory": self.host_memory, **death})

    def finish(self, name: str, why: str) -> dict[str, Any]:
        """Resumes to the end, compares every byte, and removes it all."""
        done = self.run(name, resume=True)
        assert done["code"] == 0, (why, done)
        assert contents(self.base / name) == self.bytes, why
        work = self.base / f"{name}.work"
        left = [f for pattern in ("**/*.tmp", ".*.partial", ".*.gemq-lock") for f in self.base.glob(pattern)]
        assert not left, (why, left)
        assert_same_work(work, self.base / "expected.work", why)
        shutil.rmtree(work)
        shutil.rmtree(self.base / name)
        return done


def assert_same_work(a: Path, b: Path, why: str) -> None:
    contents_a, contents_b = contents(a), contents(b)
    assert contents_a.keys() == contents_b.keys(), why
    assert {n for n in contents_a if contents_a[n] != contents_b[n]} == set(), why
