"""Long texts: tokenized in pieces to the same tokens, read in parts, from pipes as from files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gemq.assets import builtin_model, builtin_texts
from gemq.calibration import texts, tokens
from gemq.calibration.sources import Streams, calibration_windows, check_sources, source_digest
from gemq.calibration.texts import json_rows, text_chunks
from gemq.calibration.tokens import tokenize_pieces, tokenize_text
from gemq.calibration.windows import eval_windows
from gemq.errors import UserError

TEXT = "\n\n".join(path.read_text() for path in builtin_texts())
WINDOW = 16


def builtin():
    return AutoTokenizer.from_pretrained(builtin_model())


def _wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def like_llama():
    """Without a pre-tokenizer, merges cross words. Every text gets a leading space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    tokenizer.decoder = decoders.Metaspace()
    return _wrapped(tokenizer)


def like_sentencepiece():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator([TEXT], trainer)
    return _wrapped(tokenizer)


def stripping():
    """Strips white space at both ends of its input."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    return _wrapped(tokenizer)


def parts_of(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("make", [builtin, like_llama, like_sentencepiece, stripping])
@pytest.mark.parametrize("piece", [700, 3000])
def test_pieces_have_the_tokens_of_the_whole(make, piece, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "CONTEXT", 300)
    tokenizer = make()
    draw = random.Random(piece)
    odd = "".join(draw.choice("  \n\n\n\tab.é日 ") for _ in range(4000))
    for text in (TEXT, odd + TEXT[:5000] + "x" * 2500 + " " * 1500 + TEXT[5000:9000], "a\r\nb" * 900, "z" * 5000):
        pieces = list(tokenize_pieces(tokenizer, parts_of(text, 997)))
        assert [token for piece in pieces for token in piece] == tokenize_text(tokenizer, text)
    assert len(list(tokenize_pieces(tokenizer, parts_of(TEXT, 997)))) > len(TEXT) // (2 * piece) > 1


def test_a_short_text_is_never_cut(monkeypatch):
    asked = []
    monkeypatch.setattr(tokens, "tokenize_text", lambda tokenizer, text: asked.append(text) or [1])
    assert list(tokenize_pieces(None, parts_of(TEXT[:5000], 100))) == [[1]]
    assert asked == [TEXT[:5000]]


def test_memory_grows_by_the_tokens_alone(tmp_path, monkeypatch):
    """Measures Python's memory. That of the tokenizer is bounded by the length of a piece."""
    monkeypatch.setattr(tokens, "PIECE", 1 << 15)
    path, tokenizer = tmp_path / "long.txt", builtin()
    peaks = []
    for times in (4, 20):
        path.write_text(TEXT * times)
        tracemalloc.start()
        calibration_windows(Streams([str(path)], tokenizer, WINDOW, 8), seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 5 * 16 * len(TEXT)  # bytes a character: the array and its growth; 20 and more before


# Files


def test_parts_are_the_text_with_unix_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("gemq.calibration.texts.READ_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffcafé\r\nau lait\r\n\r\n日本\rx\r".encode())
    assert "".join(text_chunks(path)) == "café\nau lait\n\n日本\rx\r"
    path.write_bytes("cafés ".encode() * 3 + b"\xe9 ")
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 21\)"):
        list(text_chunks(path))


def test_windows_line_ends_change_no_window(tmp_path):
    for name, text in (("unix.txt", TEXT), ("windows.txt", TEXT.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(text.encode())
    windows = eval_windows(builtin(), [tmp_path / "unix.txt", tmp_path / "windows.txt"], WINDOW)
    assert windows.select_source(0).tokens.tolist() == windows.select_source(1).tokens.tolist()


def test_rows_by_line_and_in_one_array(tmp_path, monkeypatch):
    monkeypatch.setattr("gemq.calibration.texts.READ_BYTES", 7)
    path = tmp_path / "a.JSON"
    path.write_text('{"text": "one\u2028two"}\r\n\n{"text": "three"}')
    assert [row for _, row in json_rows(path)] == [{"text": "one\u2028two"}, {"text": "three"}]
    assert [where for where, _ in json_rows(path)] == [f"{path} line 1", f"{path} line 3"]
    path.write_text('\n[\n  {"text": "one"},\n\n  {"text": "two"}\n]\n')
    assert list(json_rows(path)) == [(f"{path} row 1", {"text": "one"}), (f"{path} row 2", {"text": "two"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": ]', "row 2 is not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "not JSON after row 1"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "has text after its array"),
        ('[{"text": "a"},', "row 2 is not JSON"),
        ("[" * 100_000, "is not JSON .it is nested too deeply"),
        ('{"text": ' + "[" * 100_000, "line 1 is not JSON .it is nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_damaged_rows(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as info:
        list(json_rows(path))
    assert "\n" not in str(info.value)


# Pipes


def piped(tmp_path, name, data):
    """A pipe that gives ``data`` to its first reader."""
    path = tmp_path / name
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_bytes(data), daemon=True).start()
    return str(path)


def test_a_pipe_is_read_once_and_gives_what_a_file_gives(tmp_path):
    tokenizer = builtin()
    (tmp_path / "a.txt").write_text(TEXT)
    pipe = piped(tmp_path, "63", TEXT.encode())
    check_sources([pipe], tokenizer, WINDOW)
    windows = calibration_windows(Streams([pipe], tokenizer, WINDOW, 8), seed=0)
    file_windows = calibration_windows(Streams([str(tmp_path / "a.txt")], tokenizer, WINDOW, 8), seed=0)
    assert windows.tokens.tolist() == file_windows.tokens.tolist()
    assert windows.names == ("pipe",)
    assert source_digest(pipe).split()[1] == source_digest(str(tmp_path / "a.txt")).split()[1]
    assert source_digest(pipe).split()[0] == "pipe"


def test_rows_come_through_a_pipe_too(tmp_path):
    tokenizer = builtin()
    pipe = piped(tmp_path, "62", "".join(f'{{"text": "{"word " * 30}"}}\n' for _ in range(20)).encode())
    streams = Streams([pipe], tokenizer, WINDOW, 8)
    calibration_windows(streams, seed=0)
    assert streams.row_stats()["pipe"].columns == {"text": 20}


@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_a_process_substitution_is_read(tmp_path, delay):
    """It is a pipe without a name, whose writer may take its time before the first byte, and long after it."""
    script = tmp_path / "count.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom gemq.calibration import texts\n"
        "texts.WRITER_SECONDS = 0.1\nprint(len(''.join(texts.text_chunks(Path(sys.argv[1])))))\n"
    )
    command = f"{sys.executable} {script} <(sleep {delay}; printf abc; sleep {delay}; printf %0200000d 0)"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "200003\n", done.stderr


def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "WRITER_SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="nothing writes to the pipe"):
        check_sources([str(tmp_path / "pipe")], builtin(), WINDOW)


def test_a_pipe_whose_writer_wrote_nothing_is_empty(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        check_sources([piped(tmp_path, "empty", b"")], builtin(), WINDOW)


def test_devices_are_refused():
    with pytest.raises(UserError, match="/dev/zero is neither a file nor a pipe"):
        list(text_chunks(Path("/dev/zero")))
