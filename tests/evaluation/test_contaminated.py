"""Overlaps with benchmarks: n-grams against plain Python, planted items found, a clean copy that holds all the rest."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from gemstill import cli
from gemstill.data.dataset import TokenDataset, read_header
from gemstill.data.shards import write_dataset
from gemstill.evaluation.config import ContaminatedConfig
from gemstill.evaluation.contaminated import run
from gemstill.evaluation.ngrams import CHARACTERS, COMMON, WORDS, Index, grams, normalise
from tests.model.tokenizers import small_tokenizer

VOCABULARY = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(400)]


def text(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def plain(text: str) -> tuple[set[str], set[str]]:
    """The n-grams of both kinds, written out in Python alone."""
    lower = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c if (c.isalnum() and c != "_") or (ord(c) > 127 and c.isidentifier()) else " " for c in lower)
    words, joined = kept.split(), "".join(kept.split())
    return (
        {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)},
        {joined[i : i + CHARACTERS] for i in range(len(joined) - CHARACTERS + 1)},
    )


STRANGE = "Ünïcode “quotes” don’t_matter—at ALL: ﬁne, 12,345.67 км и Ёлки; x² 東京は夜の七時 " * 3


@pytest.mark.parametrize("string", [text(1), text(2, 13), text(3, 12), STRANGE, "", "a", "??? !!!", "x" * 50, "x" * 49])
def test_ngrams_are_those_of_plain_python(string: str) -> None:
    read = normalise([string])
    found = grams(read)
    for kind, due in zip(("words", "characters"), plain(string), strict=True):
        spans = zip(found[kind].start.tolist(), found[kind].stop.tolist(), strict=True)
        said = [read.spelled(a, b) for a, b in spans]
        assert {s if kind == "words" else s.replace(" ", "") for s in said} == due
        assert len(set(found[kind].hashes.tolist())) == len(due)


def test_what_texts_share_is_found_whatever_stands_around_it() -> None:
    rng = random.Random(0)
    items = [[text(100 + n)] for n in range(50)]
    texts, due = [], set()
    for number in range(200):
        words = text(1000 + number, 80).split()
        if number % 4 == 0:  # a run of an item's words in it, of 4 to 16
            item, count = rng.randrange(50), rng.randrange(4, 17)
            start = rng.randrange(40 - count)
            words[30:30] = [w.upper() + "," for w in items[item][0].split()[start : start + count]]
        texts.append("  ".join(words))
        for n, (first,) in enumerate(items):
            if any(a & b for a, b in zip(plain(first), plain(texts[-1]), strict=True)):
                due.add((number, n))
    assert 20 < len(due) < 45  # the short runs are none
    index = Index(items, [0] * 50)
    found = index.matches(texts)
    assert set(found) == due
    for (number, n), shared in found.items():
        for kind, gram in shared.items():
            for side in (texts[number], items[n][0]):
                grams_of = plain(side)[("words", "characters").index(kind)]
                assert (gram if kind == "words" else gram.replace(" ", "")) in grams_of


def test_nothing_runs_over_the_end_of_a_text_or_a_field() -> None:
    words = text(7, 24).split()  # eight are 48 characters
    whole, halves = " ".join(words), [" ".join(words[start : start + 8]) for start in (0, 8, 16)]
    assert Index([[whole]], [0]).matches([whole])
    assert not Index([halves], [0]).matches([whole])
    assert not Index([[whole]], [0]).matches(halves)
    assert not Index([["a few words"]], [0]).matches([whole, ""])
    assert Index([["a few words"], halves, [whole]], [0, 0, 0]).short == 2


def test_a_tasks_own_wording_is_no_item() -> None:
    phrase = text(8, 15)
    items = [[f"{phrase} {text(50 + n, 20)}"] for n in range(COMMON + 1)]
    assert not Index(items, [0] * len(items)).matches([phrase])
    assert Index(items[:-1], [0] * COMMON).matches([phrase])
    assert Index(items, [0] * COMMON + [1]).matches([phrase])  # of no task are they more than COMMON


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 documents; documents 5 and 23 hold items, 24 holds two. And the items, as JSONL and as GSM8K's."""
    place = tmp_path_factory.mktemp("contaminated")
    (place / "text").mkdir()
    for number in range(40):
        parts = [text(number, 120)]
        parts += [text(500 + n, 30).replace(" ", "\n") for n in {5: (0,), 23: (1,), 24: (0, 2)}.get(number, ())]
        (place / "text" / f"{number:02}.txt").write_text("\n".join([*parts, text(900 + number, 30)]))
    write_dataset(place / "text", small_tokenizer(), place / "data", heldout_fraction=0, shard_bytes=9000, workers=1)
    small_tokenizer().save(place / "tokenizer")
    items = [text(500 + n, 30) for n in range(4)]
    (place / "items.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    (place / "evals" / "gsm8k").mkdir(parents=True)
    for name in ("test", "train"):
        rows = [{"question": item if name == "test" else "q", "answer": "so it is #### 7"} for item in items]
        (place / "evals" / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def config(planted: Path, out: Path, **more: Any) -> ContaminatedConfig:
    return ContaminatedConfig(str(planted / "data" / "train"), planted / "tokenizer", out=str(out), **more)


def test_planted_items_are_found_and_the_clean_copy_holds_all_the_rest(planted: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    told = run(config(planted, tmp_path / "out", items=str(planted / "items.jsonl"), clean=str(clean), workers=2))
    assert (told["documents"], told["contaminated_documents"], told["items_found"]) == (40, 3, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert [(line["document"], line["item"]) for line in lines] == [
        (5, "items.jsonl:1"), (23, "items.jsonl:2"), (24, "items.jsonl:1"), (24, "items.jsonl:3"),
    ]  # fmt: skip
    before = TokenDataset.open(planted / "data" / "train")
    for line in lines:
        start = line["start"]
        assert line["words"].split()[0] in small_tokenizer().decode(before.read(start + 1, start + 2000).tolist())
    after = TokenDataset.open(clean)
    after.verify()
    assert len(after.index["shards"]) > 1
    kept = [path.read_text() for n, path in enumerate(sorted((planted / "text").iterdir())) if n not in (5, 23, 24)]
    assert documents(after) == kept
    assert after.index["clean"] == {"of": before.fingerprint, "documents_left_out": 3}
    header = read_header(clean / after.index["shards"][0]["file"])
    mine = documents(after)[: after.index["shards"][0]["documents"]]
    digests = b"".join(hashlib.sha256(text.encode()).digest() for text in mine)
    assert header.metadata["content"] == hashlib.sha256(digests).hexdigest()
    assert after.bytes == sum(len(text.encode()) for text in kept)
    assert run(config(planted, tmp_path / "again", items=str(planted / "items.jsonl"))) | {"written": ""} == {
        name: value for name, value in told.items() if name != "clean copy"
    } | {"written": ""}


def documents(dataset: TokenDataset) -> list[str]:
    ends = [*dataset.document_starts[1:].tolist(), dataset.num_tokens]
    spans = zip(dataset.document_starts.tolist(), ends, strict=True)
    return [small_tokenizer().decode(dataset.read(start + 1, end - 1).tolist()) for start, end in spans]


def test_items_of_a_task_come_from_the_data_root(planted: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    told = run(config(planted, tmp_path / "out", tasks="gsm8k", data_root=planted / "evals"))
    assert told["contaminated_documents"] == 3
    assert told["found"] == {"gsm8k": "3 of 4 items, in 3 documents"}
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["by_task"]["gsm8k"] == {
        "items": 4, "items_found": 3, "documents": 3, "documents_by_words": 3, "documents_by_characters": 3,
    }  # fmt: skip


def test_files_of_items_that_are_no_text_are_named(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "a.txt").write_text(text(500, 30))
    (tmp_path / "items" / "b.txt").write_bytes(bytes(range(256)))
    run(config(planted, tmp_path / "out", items=str(tmp_path / "items")))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["items"], result["left_out"]) == (1, ["items: 1 files that are no text are left out"])


def flip(path: Path) -> None:
    """One bit of a shard's last token."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_bad_input_is_answered_in_one_line(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokenizer = str(planted / "data" / "train"), str(planted / "tokenizer")
    small_tokenizer(300).save(tmp_path / "other")
    items = ["--items", str(planted / "items.jsonl")]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    shutil.copytree(shards, tmp_path / "damaged")
    flip(tmp_path / "damaged" / "shard-00001.safetensors")
    for words, line in (
        ([str(tmp_path / "damaged"), "--tokenizer", tokenizer, *items], "shard-00001.safetensors: is not as it was"),
        ([shards, "--tokenizer", tokenizer, "--items", str(tmp_path / "empty.txt")], "empty.txt: holds no item; name"),
        (
            [shards, "--tokenizer", tokenizer, "--items", str(tmp_path / "binary.txt")],
            "binary.txt: holds no item; name",
        ),
        ([shards, "--tokenizer", tokenizer, "--tasks", " , "], "no items are named; give --suite, --tasks or --items"),
        ([shards, "--tokenizer", tokenizer], "no items are named; give --suite, --tasks or --items"),
        ([shards, "--tokenizer", tokenizer, "--suite", "a", "--tasks", "b"], "names a suite and tasks"),
        ([shards, "--tokenizer", tokenizer, "--suite", "gema2-pretrained"], "did you mean 'gemma2-pretrained'?"),
        ([shards, "--tokenizer", str(tmp_path / "other"), *items], "is not the tokenizer that"),
        ([str(planted / "data"), "--tokenizer", tokenizer, *items], "did you mean"),
        ([shards, "--tokenizer", tokenizer, *items, "--clean", str(planted)], "is there already"),
    ):
        assert cli.main(["data", "contaminated", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert line in said[-1]
        assert not (tmp_path / "out").exists()
