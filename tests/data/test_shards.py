"""Shards: whole or not at all, the same bytes however they came about, and never believed blindly."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset, read_header
from gemstill.data.shards import DataConfig, plan, run, write_dataset
from gemstill.data.sources import Source
from gemstill.text.tokenizer import Tokenizer
from tests.data.conftest import document

SHARD = 8000


def write(documents: Path, tokenizer: Tokenizer, out: Path, **options):
    return write_dataset(
        documents, tokenizer, out, **{"heldout_fraction": 0.2, "shard_bytes": SHARD, "workers": 1} | options
    )


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def decoded(dataset: TokenDataset, tokenizer: Tokenizer) -> list[str]:
    bounds = [*dataset.document_starts.tolist(), dataset.num_tokens]
    found = [dataset.read(begin, end).tolist() for begin, end in itertools.pairwise(bounds)]
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in found)
    return [tokenizer.decode(ids[1:-1]) for ids in found]


@pytest.fixture
def made(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    write(documents, tokenizer, tmp_path / "out")
    return tmp_path / "out"


def test_every_document_is_in_one_split_in_order(made: Path, documents: Path, tokenizer: Tokenizer) -> None:
    train, heldout = TokenDataset.open(made / "train"), TokenDataset.open(made / "heldout")
    texts = [path.read_text() for path in sorted(documents.rglob("*.txt"))]
    learned, held = decoded(train, tokenizer), decoded(heldout, tokenizer)
    assert sorted(learned + held) == sorted(texts)
    assert learned == [text for text in texts if text in set(learned)]
    assert 12 <= len(held) <= 36, "about a fifth of 120"
    assert (train.num_documents, heldout.num_documents) == (len(learned), len(held))
    assert train.bytes == sum(len(text.encode()) for text in learned)
    assert len(train.index["shards"]) > 2
    assert train.index["corpus"] == heldout.index["corpus"]
    assert train.tokenizer_fingerprint == tokenizer.fingerprint
    train.verify()
    heldout.verify()


def test_the_format_is_plain_safetensors(made: Path, tokenizer: Tokenizer) -> None:
    arrays = load_file(made / "train" / "shard-00000.safetensors")
    assert set(arrays) == {"tokens", "document_starts"}
    assert arrays["tokens"].dtype == np.uint16
    assert arrays["document_starts"].dtype == np.int64
    assert np.array_equal(np.flatnonzero(arrays["tokens"] == tokenizer.bos_id), arrays["document_starts"])
    metadata = read_header(made / "train" / "shard-00000.safetensors").metadata
    assert metadata["tokenizer"] == tokenizer.fingerprint
    assert metadata["source"][0]["name"] == "documents"
    assert "gemstill" in metadata


def test_the_stream_runs_over_shards(made: Path) -> None:
    train = TokenDataset.open(made / "train")
    whole = np.concatenate([load_file(made / "train" / shard["file"])["tokens"] for shard in train.index["shards"]])
    assert train.num_tokens == len(whole)
    chosen = random.Random(0)
    for _ in range(200):
        start, stop = sorted(chosen.randrange(len(whole) + 1) for _ in range(2))
        assert np.array_equal(train.read(start, stop), whole[start:stop])
    assert train.read(5, 5).shape == (0,)
    assert train.read(0, 1).dtype == np.int64
    starts = train.document_starts
    assert np.array_equal(starts, np.flatnonzero(whole == train.bos_id))
    assert train.document_at(np.array([0, starts[1] - 1, starts[1], len(whole) - 1])).tolist() == [
        0,
        0,
        1,
        len(starts) - 1,
    ]
    for bad in ((-1, 2), (0, len(whole) + 1), (3, 2)):
        with pytest.raises(IndexError):
            train.read(*bad)


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(
    made: Path, documents: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    write(documents, tokenizer, tmp_path / "other", workers=workers)
    assert contents(tmp_path / "other") == contents(made)


def test_bytes_do_not_depend_on_where_the_source_lies(
    made: Path, documents: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copytree(documents, tmp_path / "elsewhere" / "documents")
    write(tmp_path / "elsewhere" / "documents", tokenizer, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(made)


def test_a_second_run_goes_on_after_the_whole_shards(
    made: Path, documents: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    before = contents(made)
    for name in ("train/index.json", "heldout/index.json", "train/shard-00002.safetensors"):
        (made / name).unlink()
    (made / "train" / "shard-00002.safetensors.partial").write_bytes(b"half")
    (made / "train" / "shard-00099.safetensors.partial").write_bytes(b"half")
    written = []
    real = files._publish
    monkeypatch.setattr(files, "_publish", lambda temporary, path: (written.append(path.name), real(temporary, path)))
    write(documents, tokenizer, made)
    assert contents(made) == before
    assert sorted(written) == ["index.json", "index.json", "shard-00002.safetensors"]


SCRIPT = """
import sys
from gemstill.data.shards import write_dataset
from gemstill.text.tokenizer import Tokenizer
source, tokenizer, out, workers = sys.argv[1:5]
options = dict(heldout_fraction=0.2, shard_bytes=8000, workers=int(workers))
write_dataset(source, Tokenizer.open(tokenizer), out, **options)
"""  # without a __main__ guard, as people write scripts


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    made: Path, documents: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", documents, folder, tmp_path / "other", "2"]
    start = time.monotonic()
    subprocess.run([*command[:4], tmp_path / "timed", "2"], check=True, capture_output=True)
    duration, chosen = time.monotonic() - start, random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(chosen.uniform(0.3, 1) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "other") == contents(made)
    assert contents(tmp_path / "timed") == contents(made)


def test_other_documents_or_another_tokenizer_are_refused(
    made: Path, documents: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    before = contents(made)
    other = Tokenizer(tokenizer.data + b"\n", tokenizer.source)
    with pytest.raises(Error, match=r"shard-00000\.safetensors: was written with another tokenizer"):
        write(documents, other, made)
    with pytest.raises(Error, match="other documents or settings"):
        write(documents, tokenizer, made, shard_bytes=2 * SHARD)
    (documents / "part0" / "000.txt").write_text(document(999))
    with pytest.raises(Error, match="other documents or settings"):
        write(documents, tokenizer, made)
    assert contents(made) == before


def test_what_is_left_of_a_larger_data_set_is_not_mixed_in(made: Path, documents: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(made / "train" / "shard-00000.safetensors", made / "train" / "shard-00099.safetensors")
    with pytest.raises(Error, match=r"shard-00099\.safetensors: does not belong"):
        write(documents, tokenizer, made)


def test_two_at_once_are_refused(made: Path, documents: Path, tokenizer: Tokenizer) -> None:
    with files.locked(made), pytest.raises(Error, match="another process"):
        write(documents, tokenizer, made)


def test_split_is_by_content(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Other names, another order, other documents beside: a document stays on its side, and so do its copies."""
    first = write(documents, tokenizer, tmp_path / "first")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number in range(120):
        (renamed / f"{(number * 7) % 120:03}.txt").write_text(document(number))
        (renamed / f"copy{number:03}.txt").write_text(document(number))
    second = write(renamed, tokenizer, tmp_path / "second")
    for one, two in ((first.train, second.train), (first.heldout, second.heldout)):
        assert sorted(decoded(one, tokenizer) * 2) == sorted(decoded(two, tokenizer))
    more = write(documents, tokenizer, tmp_path / "more", heldout_fraction=0.4)
    assert set(decoded(first.heldout, tokenizer)) < set(decoded(more.heldout, tokenizer))


def test_near_copies_do_not_leak_across_the_split(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = write(documents, tokenizer, tmp_path / "first")
    held = decoded(first.heldout, tokenizer)
    for number, text in enumerate(held):
        words = text.split(" ")
        words[number % 50 + 5] = "changed"
        (documents / f"near{number:03}.txt").write_text("Copyright someone else\n" + "  ".join(words))
        (documents / f"half{number:03}.txt").write_text(
            " ".join(words[: len(words) * 2 // 3]) + document(number + 500, 20)
        )
    leaky = write(documents, tokenizer, tmp_path / "leaky")
    clean = write(documents, tokenizer, tmp_path / "clean", drop_near_copies=True)
    assert set(decoded(first.train, tokenizer)) == set(decoded(clean.train, tokenizer))
    assert leaky.train.num_documents > clean.train.num_documents
    assert clean.counts["near copies"] == leaky.train.num_documents - clean.train.num_documents
    assert clean.train.index["skipped"]["near copies"] == clean.counts["near copies"]
    assert contents(tmp_path / "clean" / "heldout").keys() == contents(tmp_path / "leaky" / "heldout").keys()
    assert decoded(clean.heldout, tokenizer) == decoded(leaky.heldout, tokenizer)


def test_a_fraction_is_a_part_of_the_whole(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = write(documents, tokenizer, tmp_path / "whole")
    half = write(documents, tokenizer, tmp_path / "half", fraction=0.5)
    third = write(documents, tokenizer, tmp_path / "third", fraction=0.3)
    parts = [set(decoded(each.train, tokenizer)) for each in (third, half, whole)]
    assert parts[0] < parts[1] < parts[2]
    assert 0.3 < len(parts[1]) / len(parts[2]) < 0.7
    assert decoded(half.heldout, tokenizer) == decoded(whole.heldout, tokenizer)


def test_no_held_out_part_when_none_is_asked_for(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    written = write(documents, tokenizer, tmp_path / "out", heldout_fraction=0)
    assert written.heldout is None
    assert written.train.num_documents == 120
    assert not (tmp_path / "out" / "heldout").exists()


def test_several_sources(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": document(1000 + n)}) + "\n" for n in range(30)))
    written = write_dataset(
        [documents, Source(tmp_path / "more.jsonl")], tokenizer, tmp_path / "out", heldout_fraction=0.1
    )
    assert written.heldout is not None
    assert written.train.num_documents + written.heldout.num_documents == 150
    assert [source["name"] for source in written.train.index["source"]] == ["documents", "more.jsonl"]


def test_a_document_longer_than_a_shard_stays_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = " ".join(document(number) for number in range(50))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("short\n")
    (tmp_path / "in" / "b.txt").write_text(long)
    (tmp_path / "in" / "c.txt").write_text("short too\n")
    train = write(tmp_path / "in", tokenizer, tmp_path / "out", heldout_fraction=0, shard_bytes=1000).train
    assert decoded(train, tokenizer) == ["short\n", long, "short too\n"]
    assert len(train.index["shards"]) == 2


def test_nul_bytes_and_lone_surrogates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["NUL \0 inside\0", "lone \ud800 surrogate", "\r\n\t\u2028 😀 \U000e0fff \ufffe"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train = write(tmp_path / "a.jsonl", tokenizer, tmp_path / "out", heldout_fraction=0).train
    assert decoded(train, tokenizer) == [texts[0], "lone \ufffd surrogate", texts[2]]


def test_empty_folder_and_only_binary_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(Error, match="in: no file matches"):
        write(tmp_path / "in", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    with pytest.raises(Error, match=r"no text in it \(skipped: 1 binary, 1 empty\)"):
        write(tmp_path / "in", tokenizer, tmp_path / "out")


def test_too_few_documents_for_both_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document\n")
    with pytest.raises(Error, match="no document fell into the heldout part"):
        write(tmp_path / "a.txt", tokenizer, tmp_path / "out", heldout_fraction=1e-9)


def test_a_file_where_the_folder_should_be(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(Error, match="out: cannot be written"):
        write(documents, tokenizer, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").write_text("")
    with pytest.raises(Error, match="cannot be written"):
        write(documents, tokenizer, tmp_path / "other")


def test_a_read_only_folder(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    place = Path("/proc/gemstill")  # read-only for root, too
    if os.geteuid() != 0:
        place = tmp_path / "read-only"
        place.mkdir(mode=0o500)
    with pytest.raises(Error, match="cannot be written"):
        write(documents, tokenizer, place / "out")


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
from gemstill.core.errors import Error
exec(open(sys.argv[5]).read().split("write_dataset(")[0])
try:
    write_dataset(source, Tokenizer.open(tokenizer), out, **options | {"shard_bytes": 20000})
except Error as error:
    print(error)
"""


def test_a_full_disk(documents: Path, folder: Path, tmp_path: Path) -> None:
    """A file that may not grow fails as one on a full disk does; nothing half written stays."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "full.py").write_text(FULL)
    command = [sys.executable, tmp_path / "full.py", documents, folder, tmp_path / "out", "1", tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert not list((tmp_path / "out").rglob("*.safetensors*"))
    assert not list((tmp_path / "out").rglob("index.json"))


def test_a_worker_that_dies_is_an_error(documents: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    from gemstill.data import workers

    real = workers.Encoders._start

    def start(self: workers.Encoders):
        process = real(self)
        process.kill()
        return process

    monkeypatch.setattr(workers.Encoders, "_start", start)
    with pytest.raises(Error, match="encoding process ended early"):
        write(documents, tokenizer, tmp_path / "out", workers=2)


def damage_truncate(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage_head(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:5])


def damage_garbage(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def damage_longer(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes() + b"more")


def damage_missing(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()


def damage_swap(folder: Path) -> None:
    shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00001.safetensors")


def lie(**change: object) -> Callable[[Path], None]:
    def change_index(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        for key, value in change.items():
            if key.startswith("shard_"):
                index["shards"][1][key.removeprefix("shard_")] = value
            else:
                index[key] = value
        (folder / "index.json").write_text(json.dumps(index))

    return change_index


def lie_consistently(folder: Path) -> None:
    """More tokens than there are, in the shard's line and in the total."""
    index = json.loads((folder / "index.json").read_text())
    index["shards"][1]["tokens"] += 5
    index["tokens"] += 5
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_truncate, r"shard-00001\.safetensors: is truncated"),
        (damage_head, r"shard-00001\.safetensors: is truncated"),
        (damage_garbage, r"shard-00001\.safetensors: is (truncated|damaged)"),
        (damage_longer, r"shard-00001\.safetensors: is too long"),
        (damage_missing, r"shard-00001\.safetensors: cannot be read"),
        (damage_swap, r"shard-00001\.safetensors: has (tokens|documents)"),
        (lie_consistently, r"shard-00001\.safetensors: has tokens"),
        (lie(tokens=7), r"index\.json: says 7 tokens, its shards have"),
        (lie(documents=0), r"says 0 documents"),
        (lie(tokenizer="other"), "has tokenizer"),
        (lie(vocab_size=100_000), "holds uint16"),
        (lie(vocab_size="many"), "no sound index"),
        (lie(version=99), "version 99"),
        (lie(shards=[]), "no sound index"),
        (lie(source="books"), "no sound index"),
        (lie(source=[{}]), "no index"),
        (lie(source=[{"name": None}]), "no sound index"),
        (lie(source=[{"name": "\ud800"}]), "no index"),
        (lie(shards=3), "no index"),
        (lie(shard_file="../../secrets"), "no sound index"),
        (lie(shard_tokens=-1), "no sound index"),
        (lambda folder: (folder / "index.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "index.json").write_text("[]"), "no index"),
        (lambda folder: (folder / "index.json").unlink(), "holds no data set"),
    ],
)
def test_damage_and_lies_are_found_on_opening(made: Path, damage: Callable[[Path], None], match: str) -> None:
    damage(made / "train")
    with pytest.raises(Error, match=match):
        TokenDataset.open(made / "train")


def test_a_flipped_bit_is_found_by_verify(made: Path) -> None:
    path = made / "train" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    dataset = TokenDataset.open(made / "train")
    with pytest.raises(Error, match=r"shard-00001\.safetensors: is not as it was written"):
        dataset.verify()


@pytest.mark.parametrize("places", [(3,), (0, -1), (0, 0), (0, 1), (0, 1 << 40)])
def test_documents_that_begin_nowhere_are_found_when_asked_for(made: Path, places: tuple[int, ...]) -> None:
    """They were an IndexError of whoever read the documents."""
    path = made / "train" / "shard-00001.safetensors"
    dtype, offset, count = read_header(path).starts
    data = bytearray(path.read_bytes())
    starts = np.frombuffer(data, dtype, count, offset)
    starts[-len(places) :] = places
    path.write_bytes(data)
    with pytest.raises(Error, match=r"shard-00001.safetensors: document_starts are not where documents begin; make"):
        _ = TokenDataset.open(made / "train").document_starts


def test_a_damaged_shard_is_written_again(made: Path, documents: Path, tokenizer: Tokenizer) -> None:
    before = contents(made)
    damage_truncate(made / "train")
    write(documents, tokenizer, made)
    assert contents(made) == before


def test_opening_the_folder_above_names_the_right_one(made: Path) -> None:
    with pytest.raises(Error, match=r"did you mean .*out/train"):
        TokenDataset.open(made)


def test_the_command(documents: Path, folder: Path, tmp_path: Path) -> None:
    config = DataConfig(Source(documents), folder, tmp_path / "out", heldout_fraction=0.2, shard_bytes=SHARD)
    figures = plan(config)
    assert not (tmp_path / "out").exists()
    written = run(config)
    assert figures["files"] == written.counts["files"] == 120
    assert figures["bytes"] == written.train.bytes + written.heldout.bytes


@pytest.mark.parametrize(
    ("option", "value"),
    [("heldout_fraction", 1.0), ("heldout_fraction", -0.1), ("fraction", 0.0), ("shard_bytes", 0), ("workers", -1)],
)
def test_settings_out_of_range(option: str, value: float) -> None:
    with pytest.raises(Error, match=option):
        DataConfig(Source(Path("a")), Path("b"), Path("c"), **{option: value})


def test_memory_does_not_grow_with_the_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Eight gigabytes in one sparse file: opening it and reading anywhere costs next to nothing."""
    tokens = 4 << 30
    header = {
        "__metadata__": {"gemstill": json.dumps({"format": "gemstill tokens", "version": 1, "tokenizer": "t"})},
        "document_starts": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "tokens": {"dtype": "U16", "shape": [tokens], "data_offsets": [8, 8 + 2 * tokens]},
    }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path = tmp_path / "shard-00000.safetensors"
    with open(path, "wb") as handle:
        handle.write(len(head).to_bytes(8, "little") + head)
        handle.truncate(8 + len(head) + 8 + 2 * tokens)
    shard = {"file": path.name, "tokens": tokens, "documents": 1, "bytes": 1, "sha256": "0"}
    index = {"format": "gemstill tokens", "version": 1, "tokenizer": "t", "vocab_size": 1000, "bos_id": 2, "eos_id": 1}
    index["source"] = []
    files.write_json(
        tmp_path / "index.json", {**index, "tokens": tokens, "documents": 1, "bytes": 1, "shards": [shard]}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = TokenDataset.open(tmp_path)
    for start in range(0, tokens, tokens // 32):
        assert not dataset.read(start, start + 1024).any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kibibytes
