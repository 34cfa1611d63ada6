"""Programs that use plain Transformers: they load a packed checkpoint, or stop. They never get random experts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gemq
from gemq.runtime.weights_notice import NOTICE, WEIGHTS_KEY
from support.entry_points import write_entry_points
from support.packed_checkpoints import olmoe_config, write_packed
from support.tokenizer import save_tokenizer

pytestmark = pytest.mark.sample
ROOT = Path(__file__).parents[2]

LOGITS = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(model(torch.arange(3, 23)[None]).logits.float().sum().item())
"""
PIPELINE = """
print(ascii(transformers.pipeline("text-generation", sys.argv[1])("a b", max_new_tokens=3)[0]["generated_text"]))
"""
ERROR = """
for path in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:
        print(repr(str(error)))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_packed(tmp_path_factory.mktemp("packed") / "out", olmoe_config(vocab_size=259))
    save_tokenizer(path)
    return path


def run_python(code: str, *paths: Path, search: Path | None = None, autoload: bool = True) -> str:
    """Runs a program that does not import gemq itself. Returns what it prints."""
    directories = [ROOT / "src", *([search] if search else [])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, directories)),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)),
    }
    command = [sys.executable, "-c", code, *map(str, paths)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_an_installed_gemq_loads_in_programs_that_do_not_import_it(packed: Path, tmp_path: Path) -> None:
    """Also when ``import torch`` happens in the middle of the import of Transformers' registry."""
    model = gemq.load(packed)
    with torch.no_grad():
        expected = model(torch.arange(3, 23)[None]).logits.float().sum().item()
    code = f"""
import sys
import transformers.quantizers.auto
assert "gemq.checkpoint.load" not in sys.modules
import torch, transformers
torch.set_num_threads(1)
assert "gemq" in sys.modules
{LOGITS}{PIPELINE}
"""
    logits, text = run_python(code, packed, search=write_entry_points(tmp_path)).splitlines()
    assert float(logits) == expected
    assert text.startswith("'a b")


def test_without_gemq_transformers_stops_with_one_line(packed: Path, tmp_path: Path) -> None:
    """Also where ``quantization_config`` is damaged or gone."""
    paths = [packed]
    for name in ("unknown", "gone"):
        path = shutil.copytree(packed, tmp_path / name)
        config = json.loads((path / "config.json").read_text())
        if name == "gone":
            del config["quantization_config"]
        else:
            config["quantization_config"]["quant_method"] = name
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    lines = run_python(f"import sys, transformers\n{ERROR}", *paths, autoload=False).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert NOTICE in line
        assert "\\n" not in line


def test_the_notice_stays_in_the_packed_checkpoint(packed: Path, tmp_path: Path) -> None:
    assert json.loads((packed / "config.json").read_text())[WEIGHTS_KEY] == NOTICE
    assert not hasattr(gemq.load(packed).config, WEIGHTS_KEY)
    gemq.write_dense_checkpoint(packed, tmp_path / "dense")
    assert WEIGHTS_KEY not in json.loads((tmp_path / "dense" / "config.json").read_text())
