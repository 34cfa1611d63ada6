"""Tensors from files to a device, here to the CPU's memory: the same code but for streams."""

import pytest
import torch
from safetensors.torch import save_file

from gemq.errors import UserError
from gemq.runtime import upload
from gemq.runtime.upload import Upload, read_spans

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Buffers that are filled several times, and tensors that take several pieces."""
    monkeypatch.setattr(upload, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(upload, "MAX_READ_BYTES", 1024)


def test_tensors_arrive_as_they_were_written(tmp_path, small):
    random = torch.Generator().manual_seed(0)
    written = [
        {
            "codes": torch.randint(0, 256, (5, 700), dtype=torch.uint8, generator=random),
            "half": torch.randn(3, 1, 129, generator=random).bfloat16(),
            "none": torch.zeros(0, 4),
            "one": torch.tensor(7),
        },
        {f"many {n}": torch.full((n,), float(n)) for n in range(60)},
    ]
    spans = {}
    for number, tensors in enumerate(written):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        spans.update(read_spans(tmp_path / f"{number}.safetensors"))
    tensors_read = Upload(CPU).tensors(spans)
    expected = written[0] | written[1]
    assert tensors_read.keys() == expected.keys()
    assert all(t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in tensors_read.items())


def test_some_rows_are_read_alone(tmp_path, small):
    tensor = torch.arange(60.0).view(6, 5, 2)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    span = read_spans(tmp_path / "x.safetensors")["x"].rows(slice(2, 5))
    assert torch.equal(Upload(CPU).tensors({"x": span})["x"], tensor[2:5])


def test_files_that_are_gone_or_cut_short_are_told_in_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    spans = read_spans(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="copy the checkpoint again"):
        read_spans(path)
    with pytest.raises(UserError, match="became shorter"):
        Upload(CPU).tensors(spans)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        Upload(CPU).tensors(spans)
