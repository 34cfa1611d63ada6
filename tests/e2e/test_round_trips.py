"""What users do with a packed checkpoint beyond loading it: save, push, offload, adapters, pipelines, lm-eval."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import hub

import gemq
from support.cli import Finished
from support.entry_points import write_entry_points

IDS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def expected(finished: Finished) -> torch.Tensor:
    return logits(gemq.load(finished.out))


def test_sharded_save_pretrained(finished, expected, tmp_path):
    model = gemq.load(finished.out)
    model.save_pretrained(tmp_path / "again", max_shard_size="500KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(gemq.load(tmp_path / "again")), expected)
    stored = json.loads((finished.out / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == stored


def test_files_of_push_to_hub(finished, expected, tmp_path, monkeypatch):
    """What would be uploaded loads again. The upload itself is not made."""

    def keep(self, working_dir, *args, **kwargs):
        shutil.copytree(working_dir, tmp_path / "pushed", dirs_exist_ok=True)

    class Repository:
        repo_id = "someone/packed"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: Repository)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", keep)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: huggingface_hub.ModelCard(""))
    gemq.load(finished.out).push_to_hub("someone/packed")
    AutoTokenizer.from_pretrained(finished.out).push_to_hub("someone/packed")
    names = {file.name for file in (tmp_path / "pushed").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    pushed = load_file(tmp_path / "pushed" / "model.safetensors")
    original = load_file(finished.out / "model.safetensors")
    assert pushed.keys() == original.keys()
    assert all(torch.equal(pushed[name], original[name]) for name in original)
    assert torch.equal(logits(gemq.load(tmp_path / "pushed")), expected)


def test_layers_on_disk(finished, expected, tmp_path):
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{i}": "disk" if i > 2 else "cpu" for i in range(6)}
    model = AutoModelForCausalLM.from_pretrained(finished.out, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model), expected)


def test_pipeline(finished):
    write = pipeline("text-generation", model=str(finished.out), device="cpu")
    [said] = write("Once upon a time", max_new_tokens=8, do_sample=False)
    ids = write.tokenizer("Once upon a time", return_tensors="pt").input_ids
    out = gemq.load(finished.out).generate(ids, max_new_tokens=8, do_sample=False)
    assert said["generated_text"] == write.tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.filterwarnings("default:.*is_gradient_checkpointing")  # PEFT reads the old name
def test_lora_trains(finished, tmp_path):
    """Adapters on packed attention: the loss falls, nothing packed changes, the adapter loads again."""
    peft = pytest.importorskip("peft")
    model = gemq.load(finished.out, dtype=torch.float32)
    packed_tensors = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(("codes", "scales"))
    }
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    adapted.save_pretrained(tmp_path)
    trained = logits(adapted.eval())
    plain = adapted.unload()
    state = plain.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in packed_tensors.items())
    again = peft.PeftModel.from_pretrained(gemq.load(finished.out, dtype=torch.float32), tmp_path)
    assert torch.equal(logits(again.eval()), trained)
    with pytest.raises(RuntimeError):  # packed weights cannot take an adapter up
        again.merge_and_unload()


TASK = """
task: sentences
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_lm_eval(finished, tmp_path):
    """A task from a local file, through lm-eval's own command line, which does not import gemq itself."""
    pytest.importorskip("lm_eval")
    rows = [("The function returns a", [" value", " banana"]), ("if (x == 0)", [" return", " elephant"])]
    data = tmp_path / "sentences.jsonl"
    data.write_text("".join(json.dumps({"start": s, "choices": c, "answer": 0}) + "\n" for s, c in rows))
    (tmp_path / "sentences.yaml").write_text(TASK.replace("DATA", str(data)))
    code = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    flags = ["run", "--model", "hf", "--model_args", f"pretrained={finished.out},dtype=float32", "--device", "cpu"]
    flags += ["--tasks", "sentences", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
    search = [str(Path(gemq.__file__).parents[1]), str(write_entry_points(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    subprocess.run([sys.executable, "-c", code, *flags], check=True, capture_output=True, cwd=tmp_path, env=environment)
    [results] = Path(tmp_path / "results").rglob("*.json")
    assert json.loads(results.read_text())["results"]["sentences"]["acc,none"] == 1.0
