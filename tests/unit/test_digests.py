"""Digests of a checkpoint's files, which threads compute ahead of their use."""

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
    original = file_hashes._FileHasher._read
    monkeypatch.setattr(
        file_hashes._FileHasher, "_read", lambda self, path: names.append(path.name) or original(self, path)
    )
    yield names
    file_hashes.stop_hashing()


def test_files_of_the_model_are_read_once(checkpoint, read):
    file_hashes.start_hashing(checkpoint)
    records = file_hashes.file_digests(checkpoint)
    assert sorted(read) == sorted(records) == ["config.json", "model.safetensors", "tokenizer.json"]
    for name, (size, changed, digest) in records.items():
        file = checkpoint / name
        assert (size, changed) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_hashes.file_digests(checkpoint, records) == records
    assert len(read) == 3


def test_a_file_that_changed_since_is_read_again(checkpoint, read):
    file_hashes.start_hashing(checkpoint)
    old_records = file_hashes.file_digests(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(b"other")
    os.utime(file, ns=(0, 1))
    new_records = file_hashes.file_digests(checkpoint, old_records)
    assert new_records.pop(file.name)[2] == hashlib.sha256(b"other").hexdigest()
    assert new_records.items() <= old_records.items()
    assert read.count(file.name) == 2


def test_stop_hashing_ends_running_threads(checkpoint, monkeypatch):
    monkeypatch.setattr(file_hashes, "CHUNK_BYTES", 1)
    started, may_continue = threading.Event(), threading.Event()
    read = file_hashes._FileHasher._read

    def read_slowly(self, path):
        started.set()
        may_continue.wait(10)
        return read(self, path)

    monkeypatch.setattr(file_hashes._FileHasher, "_read", read_slowly)
    file_hashes.start_hashing(checkpoint)
    assert started.wait(10)
    hasher = file_hashes._background[-1]
    threading.Timer(0.2, may_continue.set).start()
    file_hashes.stop_hashing()
    digest_of_nothing = hashlib.sha256(b"").hexdigest()
    finished = [future for future in hasher._digests.values() if not future.cancelled()]
    assert {future.result() for future in finished} == {digest_of_nothing}


def test_a_missing_directory_is_ignored(tmp_path):
    file_hashes.start_hashing(tmp_path / "org" / "name")
    file_hashes.stop_hashing()
