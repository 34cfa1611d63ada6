"""Runs jobs in forked children and kills them: started by ``killer.py``, talks JSON lines over stdin and stdout.

Everything is imported once and nothing computed, so that a child starts at once and inherits no threads.

A request holds the arguments of ``gemq.pipeline.quantize.quantize`` and how to die:
``delay``: after so many seconds, by the parent's ``signal`` (SIGKILL if it is not given)
``host_memory``: bytes that the job may hold
``call``:  at the n-th write (see ``Writes``), by its own SIGKILL
``spared``: half through the first file that it writes and that is not among these, by its own SIGKILL
``rename``: before this file is renamed, or the directory that holds it, by its own SIGKILL
The answer holds ``code`` (0 done, 2 refused, or minus the signal that ended the job), ``error``, ``complete_before``
and ``calls``, the names of all writes; of a job that was killed ``code`` and ``path``, what it was about to write or
rename.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers.models.olmoe.modeling_olmoe

import gemq.checkpoint.save
import gemq.pipeline.quantize
import gemq.runtime.files
from gemq.errors import UserError
from gemq.recipe import Recipe
from support.cli import few_guard_windows

WRITES = (
    *((os, name) for name in ("fsync", "replace", "rename")),
    *((module, "save_file") for module in (safetensors.torch, gemq.checkpoint.save)),
    *((Path, name) for name in ("write_text", "write_bytes")),
)
CONTENT = ("save_file", "write_text", "write_bytes")
"""Writes that fill a file."""


class Writes:
    """Counts every call that changes what is on the disk, and kills the process at one of them."""

    def __init__(self, request: dict[str, Any], answer: int):
        self.calls: list[str] = []
        self.fatal, self.spared, self.rename = request.get("call"), request.get("spared"), request.get("rename")
        self.answer = answer
        for owner, name in WRITES:
            setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            path = next((a for a in arguments if isinstance(a, Path)), None)
            renamed = self.rename and name in ("replace", "rename") and Path(self.rename).is_relative_to(path)
            halved = self.spared is not None and name in CONTENT and str(path) not in self.spared
            if halved:
                real(*arguments, **options)
                os.truncate(path, path.stat().st_size // 2)
            if halved or renamed or len(self.calls) == self.fatal:
                os.write(self.answer, json.dumps({"code": -signal.SIGKILL, "path": str(path)}).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call


def child(request: dict[str, Any], answer: int) -> None:
    writes = Writes(request, answer)
    result: dict[str, Any] = {"code": 0}
    try:
        recipe = Recipe.from_dict(request["recipe"])
        done = gemq.pipeline.quantize.quantize(
            request["model"],
            recipe,
            out=request["out"],
            work=request["work"],
            resume=request["resume"],
            host_memory=request.get("host_memory"),
        )
        result["complete_before"] = done.complete_before
    except UserError as error:
        result = {"code": 2, "error": str(error)}
    except KeyboardInterrupt:
        result = {"code": -signal.SIGINT}
    os.write(answer, json.dumps({**result, "calls": writes.calls}).encode())


def serve(request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(request, writer)
        finally:
            os._exit(0)
    os.close(writer)
    if "delay" in request:
        time.sleep(request["delay"])
        os.kill(
            pid, request.get("signal", signal.SIGKILL)
        )  # to no effect on a child that has ended, which is not waited for yet
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and not answer:
        return {"code": -os.WTERMSIG(status)}
    return json.loads(answer) if answer else {"code": 1, "error": "see stderr"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert transformers.models.olmoe.modeling_olmoe
    few_guard_windows(pytest.MonkeyPatch())
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
