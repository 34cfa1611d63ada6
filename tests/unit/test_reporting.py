"""The report page and the model card show a job's figures, load nothing, and let no text of a model become markup."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich import filesize

from gemq.errors import UserError
from gemq.quant.widths import Width
from gemq.reporting.card import BEGIN, END, model_card, source_metadata, update_card
from gemq.reporting.page import render_page, write_page
from gemq.reporting.record import checkpoint_section, hub_id, layers_of_section, public_name, read_record
from gemq.reporting.svg import widths_picture
from gemq.reporting.widths import width_colors, width_counts

HOSTILE = "</script><script>alert(1)</script><img src=https://evil.example/x>"
BINARY, TERNARY, TWO, THREE = Width(1), Width(1.6), Width(2), Width(3)
LAYERS = [
    ("model.layers.1.mlp.experts", [(BINARY, TWO), (TERNARY, THREE), (TWO, TWO)], 1.9),
    ("model.layers.2.mlp.experts", [(TWO, TWO), (TWO, TWO), (THREE, BINARY)], 2.1),
]


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": 1022,
        "windows": 2,
        "perplexity": 12.345,
        "perplexity_stderr": 0.5,
        "reference_perplexity": 11.75,
        "mean_kl": 0.0514,
        "mean_kl_stderr": 0.0031,
        "kl_p99": 0.91,
        "kl_p999": 2.42,
        "top1_agreement": 0.913,
        "top1_agreement_stderr": 0.004,
        "routing_agreement": 0.957,
        **changes,
    }


def written_text(text: str) -> dict[str, Any]:
    return {mode: {"text": text, "loop_period": None} for mode in ("greedy", "sampled")}


def generation(text: str) -> dict[str, Any]:
    figures = {"repetition_rate": 0.25, "loops": 3, "ended": 1}
    modes = {"greedy": figures, "sampled": figures}
    row = {"source": "prose", "prompt": text, "model": written_text(text), "reference": written_text("plain")}
    return {"prompts": 1, "max_new_tokens": 8, "model": modes, "reference": modes, "texts": [row]}


def make_record(text: str = "a < b & c") -> dict[str, Any]:
    """A record with every section, in which texts and names are ``text``."""
    point = {"stored_bytes": 3_000_000, "predicted_cost": 1.0, "uniform_cost": 2.0, "bits": 1.0}
    smaller = {"stored_bytes": 4_000_000, "predicted_cost": 0.25, "uniform_cost": 0.5, "bits": 2.0}
    guard_source = {"windows": 24, "kl": 0.3, "uniform_kl": 0.4, "p": 0.9, "worse": False}
    verdict = {"m": 0.0, "passed": True, "kl": 0.3, "uniform_kl": 0.4, "sources": {text: guard_source}}
    job = {
        "budget": "2 bits",
        "method": "global",
        "predicted_cost": 0.3,
        "parameters": {"experts": 4_000_000, "other": 1_000_000},
        "quantized_share": 0.8,
        "original_bytes": 10_000_000,
        "stored_bytes": 3_500_000,
        "seq_len": 128,
        "windows": {"self": 8, text: 4},
        "fallbacks": {"experts_without_tokens": 3, "distillation_dropped": 0},
        "expert_tokens": [[1, 500, 700], [300, 400, 500]],
        "gains": {"reconstruction_before": 0.08, "reconstruction_after": 0.06},
        "guard": {**verdict, "is_uniform": False, "tried": [verdict]},
        "spilled_bytes": {"disk": 0},
        "stages": {"candidates": {"seconds": 12.5, "peak_gpu_bytes": 0, "peak_host_bytes": 1_500_000_000}},
        "recipe": {"bits": 2.0, "effort": "medium", "calibration": ["self", text], "reconstruct": True},
        "curve": {"points": [point, smaller], "random_cost": 0.7, "random_bytes": 3_500_000},
        "device": "a CPU",
        "versions": {"torch": "2.13.0"},
    }
    checkpoint = checkpoint_section(
        LAYERS,
        codes="affine",
        linears={"4": 24},
        group_size=128,
        stored_bytes=3_500_000,
        bits_nominal=2.0,
        bits_stored=2.125,
        model_type="olmoe",
        memory=[{"context": 4096, "cache_bytes": 2_000_000, "working_bytes": 700_000_000}],
    )
    evaluation = {**measured(tokens=2044), "texts": {text: measured()}, "layers": [0.957], "fallbacks": [text]}
    evaluation |= {"reference": "org/model", "seq_len": 512, "dtype": "float32", "device": "cpu"}
    metric = {"metric": "acc", "filter": "none", "value": 0.625, "stderr": 0.0125}
    tasks = {text: {"num_fewshot": None, "documents": 120, "metrics": [metric]}}
    evaluation["tasks"] = {"lm_eval": "0.4.13", "limit": None, "results": tasks}
    speed = {
        "device": text,
        "dtype": "bfloat16",
        "decode": [{"batch": 1, "tokens_per_second": {"p50": 1234.5, "p20": 1200.0, "p80": 1250.0}}],
        "prefill": [],
        "fallbacks": [],
    }
    return {
        "gemq": "0.1.0",
        "model": {"name": text, "base_model": "org/model"},
        "checkpoint": checkpoint,
        "job": job,
        "evaluation": {**evaluation, "generation": generation(text)},
        "speed": speed,
    }


class Page(HTMLParser):
    """The tags, the text and the scripts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._element = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._element = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._element = ""

    def handle_data(self, data: str) -> None:
        if self._element == "script":
            self.scripts[-1] += data
        elif self._element != "style":
            self.text += data


def test_figures_of_the_page_equal_its_record():
    record = make_record()
    page = Page(render_page(record))
    assert json.loads(page.scripts[0]) == json.loads(json.dumps(record))
    text = " ".join(page.text.split())
    job, evaluation = record["job"], record["evaluation"]
    figures = [
        filesize.decimal(record["checkpoint"]["stored_bytes"], precision=2),
        filesize.decimal(job["original_bytes"], precision=2),
        f"{evaluation['mean_kl']:.4f} ±{evaluation['mean_kl_stderr']:.4f}",
        f"{evaluation['kl_p999']:.3f}",
        f"{evaluation['top1_agreement']:.1%}".replace("%", " %"),
        "3 of 1",  # loops
        "1.6 counts as 1.625",
        "KL 0.3 against uniform's 0.4 on 24 held-out windows: kept",
        "1 of 6 experts saw fewer calibration tokens than 10 % of their layer's mean",
        "3 experts saw no calibration token",
        "1.50 GB",
        "1,234.5",
        filesize.decimal(3_500_000 + 2_000_000 + 700_000_000, precision=2),  # in use at 4,096 tokens
        "full precision 11.750",
        "0.6250 ±0.0125",
    ]
    assert not [figure for figure in figures if figure not in text]


def test_a_map_shows_every_width_in_its_color():
    """Painted cell by cell from the paths, which merge neighbors."""
    layers = layers_of_section(make_record()["checkpoint"])
    colors = width_colors(layers)
    html = render_page(make_record())
    maps = re.findall(r'<svg class="map".*?</svg>', html, re.DOTALL)
    for matrix, drawn in enumerate(maps):
        painted = {}
        for color, path in re.findall(r"<path fill='(#\w+)' d='(.*?)'", drawn):
            for x, y, run in re.findall(r"M(\d+) (\d+)h(\d+)v1", path):
                painted |= {(int(y), int(x) + step): color for step in range(int(run))}
        expected = {}
        for y, layer in enumerate(layers):
            expected |= {(y, x): colors[width] for x, width in enumerate(layer.widths[matrix])}
        assert painted == expected
    assert dict(width_counts(layers))[2.0] == [3, 4]


def test_a_page_loads_nothing_and_no_text_becomes_markup():
    tags = [tag for tag, _ in Page(render_page(make_record())).tags]
    page = Page(render_page(make_record(HOSTILE)))
    assert [tag for tag, _ in page.tags] == tags
    assert tags.count("script") == 2
    for _, attributes in page.tags:
        assert not {"src", "action", "srcset", "data"} & attributes.keys()
        assert all(str(attributes.get(name, "#")).startswith("#") for name in ("href", "xlink:href"))
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in render_page(make_record())
    assert "http" not in render_page(make_record()).replace("http-equiv", "")


@pytest.mark.parametrize("section", ["job", "evaluation", "speed"])
def test_a_section_without_data_says_which_command_fills_it(section):
    record = {**make_record(), section: None}
    commands = {
        "job": "gemq quantize",
        "evaluation": "gemq report OUT --reference org/model",
        "speed": "gemq report OUT --bench",
    }
    assert commands[section] in Page(render_page(record)).text
    assert model_card(record, {})


def test_the_record_of_a_page_is_read_again(tmp_path):
    record = make_record(HOSTILE)
    record["evaluation"]["mean_kl_stderr"] = float("nan")
    write_page(tmp_path, record)
    expected = copy.deepcopy(record)
    expected["evaluation"]["mean_kl_stderr"] = None
    assert read_record(tmp_path) == json.loads(json.dumps(expected))
    assert read_record(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["no record", '<script type="application/json" id="gemq-record">[1]</script>'])
def test_a_foreign_page_is_refused_in_one_line(tmp_path, damage):
    (tmp_path / "report.html").write_text(damage)
    with pytest.raises(UserError, match="move it away"):
        read_record(tmp_path)


def test_a_record_of_wrong_types_is_refused_and_the_page_stays(tmp_path):
    page = write_page(tmp_path, make_record())
    text = page.read_text()
    record = make_record()
    record["job"]["stages"] = "none"
    with pytest.raises(UserError, match="move it away"):
        write_page(tmp_path, record)
    assert page.read_text() == text


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_has_what_the_hub_reads():
    card = model_card(make_record(), {"license": "apache-2.0", "language": ["en", "de"]})
    assert front_matter(card) == {
        "base_model": "org/model",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gemq", "moe", "quantized"],
    }
    assert "| 12.345 | 11.750 | 0.0514 | 0.910 | 2.420 | 91.3 % |" in card
    assert "| memory on a GPU with 4,096 tokens | 705.50 MB" in card
    assert "| longest context | 4,096 tokens |" in card
    assert "pip install ." in card
    assert "| this model | 3 | 3 |" in card  # loops
    assert "| decode, batch 1 | 1,234.5 |" in card
    assert "| 120 | acc | 0.6250 ±0.0125 |" in card
    local = make_record()
    local["model"]["base_model"] = None
    assert not {"base_model", "base_model_relation"} & front_matter(model_card(local, {})).keys()


@pytest.mark.parametrize("reconstruct", [True, False])
def test_a_job_that_trained_nothing_says_what_reconstruction_did(reconstruct):
    record = make_record()
    record["job"] |= {"gains": {}, "recipe": {**record["job"]["recipe"], "reconstruct": reconstruct}}
    sentence = "quantized each layer again" if reconstruct else "ssembled from the candidates, and nothing trained"
    assert sentence in model_card(record, {})
    assert sentence in Page(render_page(record)).text


def test_a_card_names_what_its_command_reads():
    record = make_record()
    text = "the original model, recipe.yaml and the calibration text that recipe.yaml names, and chooses the widths"
    assert text in model_card(record, {})
    record["job"]["method"] = "from a file"
    record["job"]["recipe"]["calibration"] = ["self"]
    assert "It reads the original model, recipe.yaml and allocation.json." in model_card(record, {})


def test_metadata_is_copied_from_the_card_of_the_original(tmp_path):
    assert source_metadata(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ndatasets: [x]\npipeline_tag: 3\n---\n# A\n")
    assert source_metadata(tmp_path) == {"license": "mit", "language": ["en"]}
    for invalid in ("license: [mit\n", "- a\n- b\n"):
        (tmp_path / "README.md").write_text(f"---\n{invalid}---\n# A\n")
        with pytest.raises(ValueError):
            source_metadata(tmp_path)


def test_measurements_are_filled_into_a_card_that_somebody_edited(tmp_path):
    record = make_record()
    card = model_card({**record, "evaluation": None}, {}) + "\nMy own words.\n"
    path = tmp_path / "README.md"
    path.write_text(card)
    assert update_card(tmp_path, record)
    text = path.read_text()
    assert "| 0.0514 |" in text
    assert text.partition(BEGIN)[0] == card.partition(BEGIN)[0]
    assert text.partition(END)[2] == card.partition(END)[2]
    path.write_text("Only my own words.\n")
    assert not update_card(tmp_path, record)
    assert path.read_text() == "Only my own words.\n"


def test_the_picture_of_a_card_is_a_file_of_svg():
    layers = layers_of_section(make_record()["checkpoint"])
    root = ElementTree.fromstring(widths_picture(layers))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"1", "1.6", "2", "3"} <= texts


def test_names_of_models_hide_directories(tmp_path):
    snapshot = tmp_path / "models--allenai--OLMoE-1B" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert hub_id(snapshot) == "allenai/OLMoE-1B"
    assert hub_id(tmp_path) is None
    assert public_name("org/name") == "org/name"
    assert public_name(str(tmp_path / "secret" / "model")) == "model"


def test_any_number_of_widths_gets_colors_in_order():
    bits = [Width(1), Width(1.6), Width(2), Width(3), Width(4), Width(8)]
    section = checkpoint_section(
        [("layers.0", [(width, width) for width in bits], 3.0)],
        codes="affine",
        linears={},
        group_size=128,
        stored_bytes=1,
        bits_nominal=3.0,
        bits_stored=3.1,
        model_type="x",
        memory=[],
    )
    colors = width_colors(layers_of_section(section))
    assert list(colors) == [1, 1.6, 2, 3, 4, 8]
    assert len(set(colors.values())) == len(colors)
