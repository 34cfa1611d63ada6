"""Windows, calibration sources, and the built-in texts."""

import json
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from gemq.assets import builtin_model, builtin_texts
from gemq.calibration import sources
from gemq.calibration.sources import Streams, calibration_windows, share_out
from gemq.calibration.windows import Windows, cut_windows, eval_windows, pack_documents, tokenize_text
from gemq.errors import UserError

WINDOW = 16


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model())


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def some_text(words, start=0):
    return " ".join(f"number {i}" for i in range(start, start + words))


def calibrate(tokenizer, *names, count=8, seed=0, **options):
    return calibration_windows(Streams(names, tokenizer, WINDOW, count), seed=seed, **options)


def test_files_are_read_once_and_may_be_read_ahead(tokenizer, tmp_path, monkeypatch):
    """Errors of a file are raised when its windows are drawn."""
    read = []
    monkeypatch.setattr(sources, "_read_stream", lambda source, *_: read.append(source) or torch.arange(160))
    streams = Streams([write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b"), "self"], tokenizer, WINDOW, 8)
    streams.start_reading()
    windows = calibration_windows(streams, seed=0, generate=lambda n: torch.zeros(n, WINDOW, dtype=torch.int64))
    again = calibration_windows(streams, seed=0, generate=lambda n: torch.zeros(n, WINDOW, dtype=torch.int64))
    assert torch.equal(windows.tokens, again.tokens)
    assert [name[-5:] for name in read] == ["a.txt", "b.txt"]
    monkeypatch.undo()
    streams = Streams([write(tmp_path / "c.txt", "too short")], tokenizer, WINDOW, 8)
    streams.start_reading()
    with pytest.raises(UserError, match="tokens"):
        calibration_windows(streams, seed=0)


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


# Windows


def test_batches_depend_on_batch_tokens_alone():
    windows = Windows(torch.zeros(7, 10, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), ("a",), (70,))
    assert list(windows.batches(30)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(windows.batches(1)) == [slice(i, i + 1) for i in range(7)]


def test_save_is_deterministic_and_load_gives_the_same(tmp_path):
    windows = Windows(torch.arange(30).view(3, 10), torch.tensor([0, 1, 1]), ("a", "b"), (10, 25))
    (tmp_path / "windows.safetensors").write_bytes(windows.to_bytes())
    loaded = Windows.load(tmp_path / "windows.safetensors")
    assert torch.equal(loaded.tokens, windows.tokens)
    assert torch.equal(loaded.source, windows.source)
    assert (loaded.names, loaded.tokens_available) == (windows.names, windows.tokens_available)
    assert loaded.tokens.dtype == loaded.source.dtype == torch.int64
    assert loaded.to_bytes() == windows.to_bytes() == (tmp_path / "windows.safetensors").read_bytes()
    assert loaded.digest() == windows.digest()
    renamed = Windows(windows.tokens, windows.source, ("a", "c"), (10, 25))
    assert renamed.digest() != windows.digest()


def test_pack_puts_separators_between_documents_only():
    assert pack_documents([[1, 2], [3], [4]], separator=0).tolist() == [1, 2, 0, 3, 0, 4]
    assert pack_documents([[1, 2], [3]], separator=None).tolist() == [1, 2, 3]
    assert cut_windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tokenize_long_text_is_silent_and_adds_nothing(tokenizer, caplog, capsys):
    tokens = tokenize_text(tokenizer, some_text(3000))
    assert len(tokens) > tokenizer.model_max_length
    assert tokenizer.bos_token_id not in tokens
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


# Evaluation windows


def test_eval_windows_are_in_order_and_drop_the_remainder(tokenizer, tmp_path):
    short, long = write(tmp_path / "a.txt", some_text(50)), write(tmp_path / "b.txt", some_text(90))
    windows = eval_windows(tokenizer, [short, long], WINDOW)
    tokens = tokenize_text(tokenizer, some_text(50))
    assert windows.names == ("a", "b")
    assert windows.tokens_available[0] == len(tokens)
    assert windows.counts()["a"] == len(tokens) // WINDOW
    flat = windows.tokens[windows.source == 0].flatten().tolist()
    assert flat == tokens[: len(flat)]
    assert eval_windows(tokenizer, [short, long], WINDOW, max_windows=2).counts() == {"a": 2, "b": 2}


def test_eval_windows_refuse_equal_stems_and_short_texts(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    files = [write(tmp_path / "a.txt", some_text(50)), write(tmp_path / "sub" / "a.md", some_text(50))]
    with pytest.raises(UserError, match="share the stem 'a': rename") as info:
        eval_windows(tokenizer, files, WINDOW)
    one_line(info)
    with pytest.raises(UserError, match=r"short.txt has \d+ tokens, fewer than a window of 16: give a longer"):
        eval_windows(tokenizer, [write(tmp_path / "short.txt", "a word")], WINDOW)
    with pytest.raises(UserError, match="at least one text file"):
        eval_windows(tokenizer, [], WINDOW)


def test_builtin_texts_have_two_to_four_windows(tokenizer):
    windows = eval_windows(tokenizer, builtin_texts(), 512)
    assert windows.names == ("c", "dict", "docs", "prose", "python")
    assert all(2 <= count <= 4 for count in windows.counts().values())


# Shares


@pytest.mark.parametrize(
    ("count", "available", "expected"),
    [
        (8, [None, None, None], [3, 3, 2]),
        (8, [1, None, None], [1, 4, 3]),
        (8, [100, 2, 1], [5, 2, 1]),
        (9, [1, 2, 100, 3], [1, 2, 3, 3]),
        (8, [2, 3], [2, 3]),
        (1, [5, 5], [1, 0]),
    ],
)
def test_share_out(count, available, expected):
    assert share_out(count, available) == expected


def test_windows_are_drawn_by_seed_and_kept_in_order(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", some_text(400))
    windows = calibrate(tokenizer, path, count=10)
    pool = cut_windows(torch.tensor(tokenize_text(tokenizer, some_text(400))), WINDOW).tolist()
    positions = [pool.index(row) for row in windows.tokens.tolist()]
    assert positions == sorted(set(positions))
    assert torch.equal(windows.tokens, calibrate(tokenizer, path, count=10).tokens)
    assert not torch.equal(windows.tokens, calibrate(tokenizer, path, count=10, seed=1).tokens)
    # a larger draw contains the smaller one
    larger = calibrate(tokenizer, path, count=20).tokens.tolist()
    assert all(row in larger for row in windows.tokens.tolist())


def test_shortfall_is_shared_and_the_end_of_all_sources_is_no_error(tokenizer, tmp_path):
    short, long = write(tmp_path / "short.txt", some_text(12)), write(tmp_path / "long.txt", some_text(200))
    few = len(tokenize_text(tokenizer, some_text(12))) // WINDOW
    assert 1 <= few <= 3
    windows = calibrate(tokenizer, short, long, count=12)
    assert windows.counts() == {"short": few, "long": 12 - few}
    everything = calibrate(tokenizer, short, count=100)
    assert len(everything) == few


def test_self_takes_its_share_from_generate(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", some_text(200))
    asked = []

    def generate(n):
        asked.append(n)
        return torch.full((n, WINDOW), 7)

    windows = calibrate(tokenizer, "self", path, count=5, generate=generate)
    assert asked == [3]
    assert windows.counts() == {"self": 3, "a": 2}
    assert (windows.tokens[:3] == 7).all()
    with pytest.raises(UserError, match="no model is at hand"):
        calibrate(tokenizer, "self")


def test_repeated_stems_get_numbers(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    files = [write(tmp_path / "a.txt", some_text(99)), write(tmp_path / "sub" / "a.txt", some_text(99, 500))]
    assert calibrate(tokenizer, *files).names == ("a", "a-2")


# JSONL


def test_jsonl_documents_are_separated_by_eos(tokenizer, tmp_path):
    rows = [{"id": 3, "body": some_text(20)}, {"id": "x", "text": some_text(20, 50) + "\u2028"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    windows = calibrate(tokenizer, path, count=1000)
    body_tokens, text_tokens = (
        tokenize_text(tokenizer, text) for text in (some_text(20), some_text(20, 50) + "\u2028")
    )
    stream = [*body_tokens, tokenizer.eos_token_id, *text_tokens]
    assert windows.tokens.flatten().tolist() == stream[: windows.tokens.numel()]
    assert windows.tokens_available == (len(stream),)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "fine"}\n{"text": ', "line 2 is not JSON .*: write one object a line"),
        ('{"text": "fine"}\n{"id": 3}', 'line 2 has no string field: name the text\'s field "text"'),
        ('["text"]', "line 1 is not an object: write one object a line"),
    ],
)
def test_broken_jsonl(tokenizer, tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as info:
        calibrate(tokenizer, write(tmp_path / "a.jsonl", lines))
    one_line(info)


# Mistakes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: give a file"),
        (b" \n", "is empty: give a file"),
        (b"abc\0def", "is a binary file: give a text file"),
        (b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\): convert it"),
        (b"a word", r"has \d+ tokens, fewer than a window of 16: give a longer text or a smaller --seq-len"),
    ],
)
def test_unusable_files(tokenizer, tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=message) as info:
        calibrate(tokenizer, str(tmp_path / "a.txt"))
    assert str(tmp_path / "a.txt") in one_line(info)


def test_wrong_paths(tokenizer, tmp_path):
    with pytest.raises(UserError, match="is a directory: name a text file in it"):
        calibrate(tokenizer, str(tmp_path))
    for path in (str(tmp_path / "none.txt"), "none.txt", "./none", "some/where/else"):
        with pytest.raises(UserError, match="does not exist: check the path") as info:
            calibrate(tokenizer, path)
        one_line(info)
    path = write(tmp_path / "a.txt", some_text(50))
    with pytest.raises(UserError, match="given twice: name it once"):
        calibrate(tokenizer, path, f"{tmp_path}/../{tmp_path.name}/a.txt")
    with pytest.raises(UserError, match="self is given twice"):
        calibrate(tokenizer, "self", "self")
    with pytest.raises(UserError, match="no calibration source"):
        calibrate(tokenizer)


# Data sets


class DatasetsError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch):
    """A fake ``datasets`` that records requests and returns rows or an error."""
    module = types.ModuleType("datasets")
    module.exceptions = types.SimpleNamespace(DatasetsError=DatasetsError)
    module.asked, module.read, module.rows, module.error = [], 0, [], None

    def load_dataset(name, config, *, split, streaming):
        module.asked.append((name, config, split, streaming))
        if module.error:
            raise module.error
        for row in module.rows:
            module.read += 1
            yield row

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: module)
    return module


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("someone/notes", ("someone/notes", None, "train", True)),
        ("someone/notes:small", ("someone/notes", "small", "train", True)),
        ("notes-v1.5::test", ("notes-v1.5", None, "test", True)),
        ("someone/notes:small:test", ("someone/notes", "small", "test", True)),
    ],
)
def test_dataset_ids(tokenizer, hub, source, asked):
    hub.rows = [{"n": 1, "body": some_text(10, 20 * i)} for i in range(40)]
    windows = calibrate(tokenizer, source, count=3)
    assert hub.asked == [asked]
    assert windows.names == (source,)
    assert len(windows) == 3
    # An endless data set is read only as far as the draw reaches.
    assert hub.read < 40
    assert windows.tokens_available[0] >= sources.POOL * 3 * WINDOW


def test_dataset_mistakes(tokenizer, hub):
    hub.error = DatasetsError("no such thing\nat all")
    with pytest.raises(UserError, match=r"neither a file nor a data set that can be read \(no such thing\)") as info:
        calibrate(tokenizer, "someone/notes")
    one_line(info)
    hub.error, hub.rows = None, [{"n": 1}]
    with pytest.raises(UserError, match="data set someone/notes has no string field"):
        calibrate(tokenizer, "someone/notes")


def test_dataset_without_the_extra(tokenizer, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no file someone/notes; .*pip install datasets"):
        calibrate(tokenizer, "someone/notes")


def test_a_share_of_windows_has_the_same_share_of_every_source():
    tokens = torch.arange(26 * 4).view(26, 4)
    windows = Windows(tokens, torch.tensor([0] * 20 + [1] * 5 + [2]), ("a", "b", "c"), (80, 20, 4))
    share = windows.subsample(41)
    assert share.counts() == {"a": 8, "b": 2, "c": 1}
    assert torch.equal(share.tokens[:8], tokens[[0, 2, 5, 7, 10, 12, 15, 17]])
    assert windows.subsample(0) is windows
    assert windows.subsample(104) is windows
