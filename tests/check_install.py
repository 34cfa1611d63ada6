"""Runs every command of an installed gemq in an environment that has only its run-time dependencies.

``make check-install PYTHON=python3.13`` builds the wheel and such an environment, and runs this file in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gemq
from gemq.assets import builtin_model
from gemq.cli import COMMANDS

PROGRAM = str(Path(sys.executable).with_name("gemq"))
JOB = ("--effort", "low", "--num-windows", "4", "--seq-len", "32", "-q")
PLAIN_LOAD = """
import sys
from transformers import AutoModelForCausalLM, pipeline
AutoModelForCausalLM.from_pretrained("out")
print(pipeline("text-generation", "out")("Once", max_new_tokens=2)[0]["generated_text"])
assert "gemq.checkpoint.load" in sys.modules
"""
MODEL = str(builtin_model())
RUNS: dict[str, list[str]] = {
    "plan": [MODEL, "--bits", "2"],
    "quantize": [MODEL, "-o", "out", "--bits", "2", *JOB],
    "export": ["out.work", "-o", "smaller", "--bits", "1.5", "-q"],
    "eval": ["out", "--reference", MODEL, "--max-windows", "1", "--seq-len", "32"],
    "generate": ["out", "-p", "Once upon a time", "--max-new-tokens", "4"],
    "bench": ["out", "--new-tokens", "2", "--prefill", "16"],
    "inspect": ["out", "--verify"],
    "report": ["out", "--reference", MODEL, "--max-windows", "1", "--seq-len", "32", "-q"],
    "demo": ["--help"],
    "serve": ["out"],
}
"""Arguments of every command, in the order in which they run. ``demo`` takes minutes, ``serve`` needs vLLM."""


def main() -> None:
    """Run all commands in a temporary directory. Raises an exception if one of them fails."""
    assert "site-packages" in str(gemq.__file__), f"{gemq.__file__} is not an installed gemq"
    missing = set(COMMANDS) - set(RUNS)
    assert not missing, f"add to RUNS: {missing}"
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        print(run([PROGRAM, "--version"]), end="")
        print(f"gemq --help: {min(seconds_of_help() for _ in range(5)):.2f} s, the fastest of five")
        for command, arguments in RUNS.items():
            start = time.perf_counter()
            run([PROGRAM, command, *arguments], code=2 if command == "serve" else 0)
            print(f"gemq {command}: {time.perf_counter() - start:.1f} s", flush=True)
        print(run([sys.executable, "-c", PLAIN_LOAD]), end="")


def seconds_of_help() -> float:
    """Return the time of ``gemq --help``."""
    start = time.perf_counter()
    run([PROGRAM, "--help"])
    return time.perf_counter() - start


def run(command: list[str], code: int = 0) -> str:
    """Run a program and return what it prints. Raises AssertionError if its exit code is not ``code``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
