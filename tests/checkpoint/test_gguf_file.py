"""The container: the package `gguf` reads ours and we read its; what lies is refused before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemstill.checkpoint.gguf_file import GgufFile, Out, write_gguf
from gemstill.core.errors import Error
from gemstill.ops.blocks import BLOCKS, quantize

gguf = pytest.importorskip("gguf")
HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def test_what_gguf_writes(tmp_path):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_custom_alignment(64)
    values = {
        "uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "straße 🙂",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.names", ["a", "", "🙂"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.flags", [True, False])
    weights = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((2, 3, 4), np.float16)}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert {key.removeprefix("test."): file.fields[key] for key in map("test.{}".format, values)} == values
    assert file.fields["test.names"] == ["a", "", "🙂"]
    assert file.fields["test.numbers"].tolist() == [1, -2, 3]
    assert file.fields["test.flags"].tolist() == [True, False]
    for name, weight in weights.items():
        assert file.tensors[name].shape == weight.shape
        assert file.tensors[name].offset % 64 == 0
        assert bytes(file.data(name).numpy()) == weight.tobytes()


FIELDS = {
    "general.architecture": "gemma2",
    "a.bool": True,
    "a.whole": 7,
    "a.below": -7,
    "a.large": 2**40,
    "a.float": 0.25,
    "a.names": ["x", "straße"],
    "a.floats": np.array([0.5, 1.5], np.float32),
    "a.wholes": np.array([5, -6], np.int32),
}


def write(path, fields=FIELDS):
    outs = []
    for name, shape, kind in (("one", (3,), "F32"), ("two", (4, 64), "Q8_0"), ("three", (2, 2), "BF16")):
        data = quantize(torch.ones(shape), kind)
        outs.append(Out(name, shape, BLOCKS[kind], lambda data=data: data.split(1)))
    write_gguf(path, fields, outs)
    return path


def test_what_gguf_reads(tmp_path):
    path = write(tmp_path / "ours.gguf")
    reader = gguf.GGUFReader(path)
    for key, value in FIELDS.items():
        found = reader.fields[key].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert {tensor.name: list(reversed(tensor.shape)) for tensor in reader.tensors} == {
        "one": [3], "two": [4, 64], "three": [2, 2]
    }  # fmt: skip
    assert np.array_equal(reader.tensors[1].data, quantize(torch.ones(4, 64), "q8_0").numpy())
    file = GgufFile(path)
    assert torch.equal(file.data("two"), quantize(torch.ones(4, 64), "q8_0"))
    assert path.read_bytes() == write(tmp_path / "again.gguf").read_bytes()


def refused(path, data, message=None):
    path.write_bytes(data)
    with pytest.raises(Error, match=message) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off(tmp_path):
    whole = write(tmp_path / "good.gguf").read_bytes()
    last = GgufFile(tmp_path / "good.gguf").tensors["three"]
    for size in range(0, last.offset + last.nbytes, 3):
        refused(tmp_path / "cut.gguf", whole[:size])


def text(value):
    return struct.pack("<Q", len(value)) + value


def file_of(tensors=b"", count=0, fields=b"", field_count=0, version=3, magic=b"GGUF", rest=b"\0" * 256):
    return magic + struct.pack("<IQQ", version, count, field_count) + fields + tensors + rest


def tensor(name=b"w", sizes=(4,), kind=0, offset=0, dimensions=None):
    dimensions = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", dimensions, *sizes, kind, offset)


CASES = {
    "magic": (file_of(magic=b"GGML"), "is no GGUF"),
    "version 1": (file_of(version=1), "version 1"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "empty": (b"", "too short"),
    "key twice": (file_of(fields=(text(b"a") + struct.pack("<IB", 0, 1)) * 2, field_count=2), "field 'a' twice"),
    "empty key": (file_of(fields=text(b"") + struct.pack("<IB", 0, 1), field_count=1), "name that is none"),
    "key no text": (file_of(fields=text(b"\xff\xfe") + struct.pack("<IB", 0, 1), field_count=1), "UTF-8"),
    "bad type": (file_of(fields=text(b"a") + struct.pack("<I", 13), field_count=1), "of type 13"),
    "nested": (file_of(fields=text(b"a") + struct.pack("<IIQ", 9, 9, 1), field_count=1), "list of type 9"),
    "alignment 0": (
        file_of(tensor(), 1, text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "general.alignment is 0"),
    "alignment 48": (
        file_of(tensor(), 1, text(b"general.alignment") + struct.pack("<II", 4, 48), 1), "no power of two"),
    "alignment text": (
        file_of(tensor(), 1, text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"), 1), "no power of two"),
    "tensor twice": (file_of(tensor() + tensor(offset=32), 2), "tensor 'w' twice"),
    "overlap": (file_of(tensor(sizes=(16,)) + tensor(b"v", offset=32), 2), "'w' and 'v' overlap"),
    "same place": (file_of(tensor() + tensor(b"v"), 2), "overlap"),
    "unaligned": (file_of(tensor(offset=4), 1), "does not lie within"),
    "no dimensions": (file_of(tensor(sizes=()), 1), "0 dimensions"),
    "5 dimensions": (file_of(tensor(sizes=(1,) * 5), 1), "5 dimensions"),
    "size 0": (file_of(tensor(sizes=(4, 0)), 1), "cannot have"),
    "half a block": (file_of(tensor(sizes=(48,), kind=8), 1), "Q8_0 cannot have"),
    "removed format": (file_of(tensor(kind=4), 1), "format number 4"),
    "future format": (file_of(tensor(kind=999), 1), "format number 999"),
    "long name": (file_of(tensor(b"n" * 70_000), 1), "name that is none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_lies(case, tmp_path):
    data, message = CASES[case]
    refused(tmp_path / "bad.gguf", data, message)


@pytest.mark.parametrize("huge", HUGE)
def test_huge_numbers_cost_nothing(huge, tmp_path):
    number = struct.pack("<Q", huge)
    cases = [
        b"GGUF" + struct.pack("<I", 3) + number + struct.pack("<Q", 0) + bytes(64),
        b"GGUF" + struct.pack("<IQ", 3, 0) + number + bytes(64),
        file_of(fields=number + b"key", field_count=1),
        file_of(fields=text(b"a") + struct.pack("<I", 8) + number, field_count=1),
        file_of(fields=text(b"a") + struct.pack("<II", 9, 8) + number, field_count=1),
        file_of(fields=text(b"a") + struct.pack("<II", 9, 4) + number, field_count=1),
        file_of(fields=text(b"a") + struct.pack("<II", 9, 7) + number, field_count=1),
        file_of(tensor(sizes=(huge,)), 1),
        file_of(tensor(sizes=(huge, huge, huge, huge)), 1),
        file_of(tensor(offset=huge & ~31), 1),
    ]
    for data in cases:
        tracemalloc.start()
        refused(tmp_path / "bad.gguf", data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_end_as_a_file_or_an_error(changes, tmp_path):
    path = tmp_path / "good.gguf"
    if not path.exists():
        write(path)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    try:
        file = GgufFile(bad)
    except Error:
        return
    for name, info in file.tensors.items():
        assert file.data(name).numel() == info.nbytes


def test_no_file(tmp_path):
    with pytest.raises(Error, match="there is no such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(Error, match="is no file"):
        GgufFile(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    def parts():
        yield torch.zeros(4, dtype=torch.uint8)
        raise Error("no more")

    with pytest.raises(Error, match="no more"):
        write_gguf(tmp_path / "model.gguf", {}, [Out("w", (4,), BLOCKS["F32"], parts)])
    assert not list(tmp_path.iterdir())


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    path, weight = tmp_path / "model.gguf", torch.arange(64.0)
    write_gguf(path, FIELDS, [Out("one", weight.shape, BLOCKS["F32"], lambda: weight)])
    file = GgufFile(path)
    assert torch.equal(file.copy("one"), file.data("one"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Error, match="has become shorter"):
        file.copy("one")
    path.unlink()
    with pytest.raises(Error, match="cannot be read"):
        file.copy("one")
