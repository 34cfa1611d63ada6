"""Digests of a checkpoint's files, begun before they are asked for."""

import hashlib
import json
import os
import threading

import pytest

from gemq.models import file_hashes


@pytest.fixture
def checkpoint(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(json.dumps({"name": name * 1000}))
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read."""
    names = []
    original = file_hashes._Reading._read
    monkeypatch.setattr(
        file_hashes._Reading, "_read", lambda self, path: names.append(path.name) or original(self, path)
    )
    yield names
    file_hashes.end()


def test_files_of_the_model_are_read_once(checkpoint, read):
    file_hashes.begin(checkpoint)
    found = file_hashes.file_digests(checkpoint)
    assert sorted(read) == sorted(found) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name, (size, changed, digest) in found.items():
        file = checkpoint / name
        assert (size, changed) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_hashes.file_digests(checkpoint, found) == found
    assert len(read) == 3


def test_a_file_that_changed_meanwhile_is_read_again(checkpoint, read):
    file_hashes.begin(checkpoint)
    before = file_hashes.file_digests(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"other")
    os.utime(file, ns=(0, 1))
    after = file_hashes.file_digests(checkpoint, before)
    assert after.pop(file.name)[2] == hashlib.sha256(b"other").hexdigest()
    assert after.items() <= before.items()
    assert read.count(file.name) == 2


def test_what_nobody_will_ask_for_is_read_no_further(checkpoint, monkeypatch):
    monkeypatch.setattr(file_hashes, "CHUNK_BYTES", 1)
    begun, goes_on = threading.Event(), threading.Event()
    read = file_hashes._Reading._read

    def slowly(self, path):
        begun.set()
        goes_on.wait(10)
        return read(self, path)

    monkeypatch.setattr(file_hashes._Reading, "_read", slowly)
    file_hashes.begin(checkpoint)
    assert begun.wait(10)
    reading = file_hashes._background[-1]
    threading.Timer(0.2, goes_on.set).start()
    file_hashes.end()
    nothing = hashlib.sha256(b"").hexdigest()
    done = [each for each in reading._digests.values() if not each.cancelled()]
    assert {each.result() for each in done} == {nothing}


def test_a_directory_that_is_not_there_is_none_of_its_business(tmp_path):
    file_hashes.begin(tmp_path / "org" / "name")
    file_hashes.end()
