"""Rows of JSON and data sets: where their text is, and what is refused."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from transformers import AutoTokenizer

import gemq
from gemq.assets import builtin_model
from gemq.calibration.rows import RowReader, RowStats, row_texts
from gemq.calibration.sources import Streams, _is_file, _unique_names, calibration_windows, check_sources
from gemq.calibration.windows import eval_windows
from gemq.cli.tables import print_result
from gemq.errors import UserError
from gemq.recipe import Recipe
from support.families import tiny
from support.tokenizer import save_tokenizer

WINDOW = 16
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model())


def read(tokenizer, *values, column=None):
    rows = RowStats()
    reader = RowReader(tokenizer, column)
    return list(row_texts(iter([(f"row {i}", v) for i, v in enumerate(values)]), reader, rows, "the source")), rows


QUESTION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        ({"id": "x-1", "text": "Words."}, "text", "Words."),
        ({"id": "x-1", "messages": QUESTION}, "messages", "Why?\n\nSo."),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            "conversations",
            "Why?\n\nSo.",
        ),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Why?", "So."]}}, "conversations", "Why?\n\nSo."),
        ({"prompt": "Why?", "prompt_id": "77", "messages": QUESTION}, "messages", "Why?\n\nSo."),
        ({"prompt": "Why?", "response": "So."}, "prompt+response", "Why?\n\nSo."),
        ({"prompt": "Why?", "completion": "So."}, "prompt+completion", "Why?\n\nSo."),
        ({"prompt": QUESTION[:1], "completion": QUESTION[1:]}, "prompt+completion", "Why?\n\nSo."),
        (
            {"instruction": "Tell.", "input": "Why?", "output": "So."},
            "instruction+input+output",
            "Tell.\n\nWhy?\n\nSo.",
        ),
        ({"instruction": "Tell.", "input": "", "output": "So."}, "instruction+output", "Tell.\n\nSo."),
        ({"question": "Why?", "answer": "So."}, "question+answer", "Why?\n\nSo."),
        (
            {"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
            "system_prompt+question+response",
            "Be brief.\n\nWhy?\n\nSo.",
        ),
        ({"url": "http://x.y", "text": None, "content": "Words."}, "content", "Words."),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]}]},
            "messages",
            "Why?",
        ),
        ({"messages": json.dumps(QUESTION)}, "messages", "Why?\n\nSo."),
        ({"text": "half a sign \ud800"}, "text", "half a sign \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_where_the_text_is(tokenizer, row, columns, text):
    texts, rows = read(tokenizer, row)
    assert texts == [text]
    assert rows.to_dict() == {"columns": {columns: 1}, "empty_rows": 0, "rows_without_template": 0}


def test_conversations_go_through_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    said = f"{tokenizer.bos_token or ''}[user] Why?{tokenizer.eos_token}[assistant] So."  # the end token separates
    for row in ({"messages": QUESTION}, {"prompt": "Why?", "response": "So."}):
        texts, rows = read(tokenizer, row)
        assert texts == [said]
        assert not rows.untemplated
    texts, rows = read(tokenizer, {"text": "Words."}, {"system": "Be brief.", "prompt": "Why?", "response": "So."})
    assert texts == ["Words.", "Be brief.\n\nWhy?\n\nSo."]  # the template refuses the second one, which is counted
    assert rows.untemplated == 1


def test_a_column_that_is_named(tokenizer):
    rows = {"id": "x-1", "text": "Words.", "abstract": "In short.", "chosen": QUESTION}
    assert read(tokenizer, rows, column="abstract")[0] == ["In short."]
    assert read(tokenizer, rows, column="chosen")[0] == ["Why?\n\nSo."]
    with pytest.raises(UserError, match="no column body: give --calibration-column one of id, text, abstract, chosen"):
        read(tokenizer, rows, column="body")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "conv-0001", "turns": [1, 2]},
            r"no column that is known to hold text .*--calibration-column \(it has id, turns",
        ),
        ({"url": "http://x.y", "title": "A title"}, r"\(it has url, title\)"),
        ({"prompt": "Why?", "id": "x"}, r"\(it has prompt, id\)"),
        ({"text": 5, "id": "x"}, r"neither text nor messages in its column text.* \(it has text, id\)"),
        ({"messages": [{"role": "user", "content": 5}]}, "neither text nor messages in its column messages"),
        ({"n": 1}, 'no string field: name the text\'s field "text"'),
        ({"a\x1b[2J": "x", "\n": "y"}, r"it has 'a\\x1b\[2J', '\\n'"),
        ({f"column_{i}": "x" for i in range(40)}, "column_11 and 28 more"),
    ],
)
def test_rows_without_text_are_refused_with_their_columns(tokenizer, row, message):
    with pytest.raises(UserError, match=message) as info:
        read(tokenizer, row)
    assert str(info.value).isprintable()


def test_rows_with_nothing_in_them_are_left_out_and_counted(tokenizer):
    texts, rows = read(tokenizer, {"text": ""}, {"text": "Words."}, {"text": " \n"}, {"text": None}, {"messages": []})
    assert texts == ["Words."]
    assert (rows.empty, dict(rows.columns)) == (4, {"text": 4, "messages": 1})
    with pytest.raises(
        UserError, match=r"the source has no text in text in any of its rows \(they have url, text, long\)"
    ):
        read(tokenizer, *[{"url": f"http://x.y/{i}", "text": None, "long": "Words."} for i in range(3)])


def test_a_data_set_without_text_and_end_is_given_up(tokenizer, monkeypatch):
    monkeypatch.setattr("gemq.calibration.rows.MAX_EMPTY_ROWS", 50)
    endless = iter(lambda: ("row", {"text": ""}), None)
    with pytest.raises(UserError, match="has no text"):
        list(row_texts(endless, RowReader(tokenizer), RowStats(), "the source"))


# Sources


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_rows(count=60):
    return [" ".join(f"number {i}" for i in range(n, n + 9)) for n in range(count)]


def test_calibration_reports_columns_and_eval_reads_the_same(tokenizer, tmp_path):
    texts = some_rows()
    good = write(tmp_path / "good.jsonl", [{"text": text} for text in texts])
    other_file = write(
        tmp_path / "other.NDJSON", [{"id": f"c-{i}", "body_text": t, "n": ""} for i, t in enumerate(texts)]
    )
    streams = Streams([good], tokenizer, WINDOW, 8)
    windows = calibration_windows(streams, seed=0)
    assert streams.row_stats()["good"].columns == {"text": 60}
    named = Streams([other_file], tokenizer, WINDOW, 8, column="body_text")
    assert calibration_windows(named, seed=0).tokens.tolist() == windows.tokens.tolist()
    for refused in (
        lambda: check_sources([other_file], tokenizer, WINDOW),
        lambda: calibration_windows(Streams([other_file], tokenizer, WINDOW, 8), seed=0),
    ):
        with pytest.raises(UserError, match="--calibration-column"):
            refused()
    stats_by_name: dict[str, RowStats] = {}
    all_windows = eval_windows(tokenizer, [good], WINDOW, row_stats=stats_by_name)
    assert stats_by_name["good"].columns == {"text": 60}
    assert set(map(tuple, windows.tokens.tolist())) <= set(map(tuple, all_windows.tokens.tolist()))
    with pytest.raises(UserError, match="--text-column"):
        eval_windows(tokenizer, [other_file], WINDOW)


def test_one_row_scores_as_its_text(tokenizer, tmp_path):
    text = "\n".join(some_rows())
    (tmp_path / "plain.txt").write_text(text)
    windows = eval_windows(tokenizer, [tmp_path / "plain.txt", write(tmp_path / "row.jsonl", [{"text": text}])], WINDOW)
    assert windows.select_source(0).tokens.tolist() == windows.select_source(1).tokens.tolist()


def test_a_file_called_self_is_no_text_that_the_model_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("self.txt", "self.jsonl", "other.txt"):
        (tmp_path / name).write_text("x")
    assert _unique_names(["self.txt", "self"]) == ["self-2", "self"]
    assert _unique_names(["self", "self.txt", "other.txt", "./self.jsonl"]) == ["self", "self-2", "other", "self-3"]


@pytest.mark.parametrize(
    ("source", "is_file"),
    [
        ("wikimedia/wikipedia:20231101.en", False),
        ("wikimedia/wikipedia:20231101.en:train", False),
        ("allenai/c4", False),
        ("notes-v1.5", False),
        ("notes.txt", True),
        ("texts/notes.txt", True),
        ("./a:b", True),
        ("a/b/c", True),
    ],
)
def test_files_and_data_sets(source, is_file):
    assert _is_file(source) == is_file


def test_tokens_without_an_embedding_are_refused_before_anything_runs(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    path = tmp_path / "chat.txt"
    path.write_text("".join(f"<|im_start|>user\n{text}<|im_end|>\n" for text in some_rows()))
    message = r"'<\|im_(start|end)\|>' \(number 409[67]\), and the model's embedding has 4096 rows"
    for refused in (
        lambda: check_sources([str(path)], tokenizer, WINDOW, embeddings=4096),
        lambda: calibration_windows(Streams([str(path)], tokenizer, WINDOW, 8, embeddings=4096), seed=0),
        lambda: eval_windows(tokenizer, [path], WINDOW, embeddings=4096),
    ):
        with pytest.raises(UserError, match=message) as info:
            refused()
        assert str(path) in str(info.value)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"chat template holds the token '<\|im_start\|>'"):
        check_sources(["self"], tokenizer, WINDOW, embeddings=4096)
    check_sources(["self"], tokenizer, WINDOW, embeddings=4098)


def test_a_job_says_which_columns_it_used_and_what_it_left_out(tmp_path, capsys):
    source, out = tmp_path / "model", tmp_path / "out"
    tiny("olmoe").save_pretrained(source)
    save_tokenizer(source)
    rows = [{"id": f"c-{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(some_rows(8))]
    calibration = write(tmp_path / "chat.jsonl", [*rows, {"id": "c-x", "messages": []}])
    recipe = Recipe(effort="low", calibration=(calibration,), num_windows=4, seq_len=WINDOW, guard=False)
    result = gemq.quantize(str(source), recipe, out=out, device="cpu")
    printed = {"columns": {"messages": 9}, "empty_rows": 1, "rows_without_template": 0}
    assert result.calibration_rows == {"chat": printed} == result.to_dict()["calibration_rows"]
    assert result.fallbacks["calibration_rows_empty"] == 1
    print_result(Console(width=200), result)
    said = capsys.readouterr().out
    assert "4 chat (column messages)" in said
    assert "1 rows of calibration sources have no text" in said
    again = gemq.quantize(str(source), recipe, out=out, device="cpu", resume=True)
    assert again.calibration_rows == {"chat": printed}
    with pytest.raises(UserError, match="calibration_column"):
        gemq.quantize(str(source), recipe.replace(calibration_column="id"), out=out, device="cpu", resume=True)
