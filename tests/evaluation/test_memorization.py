"""Memorization: windows and distances by plain counting, and a miniature that has learned planted text by heart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch

from gemstill import cli
from gemstill.checkpoint.source import load, save
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset, write_shard
from gemstill.data.shards import write_dataset
from gemstill.evaluation.config import MemorizationConfig
from gemstill.evaluation.memorization import ANSWER, PROMPT, Windows, distance, run, share
from gemstill.infer.engine import Engine
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer
from gemstill.train.config import DataChoice, ModelChoice, OptimizerConfig, ScheduleConfig, SourceConfig, TrainConfig
from gemstill.train.run import train
from tests.evaluation.planted import REPEATS, write_corpus
from tests.infer.networks import SMALL, network
from tests.model.tokenizers import TEXT, small_tokenizer

LENGTH = PROMPT + ANSWER


def dataset(
    folder: Path, documents: Sequence[Sequence[int]], name: str = "made", words: Tokenizer | None = None
) -> TokenDataset:
    """A data set of these documents, ids without marks."""
    words = words or small_tokenizer()
    rows = [[words.bos_id, *ids, words.eos_id] for ids in documents]
    tokens = np.array([token for row in rows for token in row], np.uint16)
    starts = np.cumsum([0, *map(len, rows)][:-1], dtype=np.int64)
    common = {"format": "gemstill tokens", "version": 1, "tokenizer": words.fingerprint, "source": [{"name": name}]}
    folder.mkdir(parents=True, exist_ok=True)
    digest = write_shard(folder / "shard-00000.safetensors", tokens, starts, common)
    counts = {"tokens": len(tokens), "documents": len(rows), "bytes": len(tokens)}
    marks = {"vocab_size": words.vocab_size, "bos_id": words.bos_id, "eos_id": words.eos_id}
    shard = {"file": "shard-00000.safetensors", "sha256": digest, **counts}
    (folder / "index.json").write_text(json.dumps({**common, **marks, **counts, "shards": [shard]}))
    return TokenDataset.open(folder)


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(270, 320, count).tolist()


def test_windows_are_all_there_are_and_are_drawn_alike(tmp_path: Path) -> None:
    lengths = [[LENGTH + 3, 10, LENGTH - 1], [LENGTH, 150]]
    documents = [[ids(n, 10 * i + j) for j, n in enumerate(row)] for i, row in enumerate(lengths)]
    windows = Windows([dataset(tmp_path / str(n), row) for n, row in enumerate(documents)])
    due = [
        (source, document[start : start + LENGTH])
        for source, row in enumerate(documents)
        for document in row
        for start in range(len(document) - LENGTH + 1)
    ]
    assert [(w.source, w.ids) for w in map(windows.read, range(windows.total))] == due
    assert windows.draw(windows.total + 1, 0).tolist() == list(range(windows.total))
    counts = np.zeros(windows.total)
    for seed in range(400):
        drawn = windows.draw(7, seed)
        assert len(set(drawn.tolist())) == 7
        counts[drawn] += 1
    expected = 400 * 7 / windows.total
    assert ((counts - expected) ** 2 / expected).sum() < 2 * windows.total  # chi-squared


def test_distance_is_the_shortest_way_of_edits() -> None:
    def plain(a: Sequence[int], b: Sequence[int]) -> int:
        if not a or not b:
            return len(a) + len(b)
        same = plain(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, plain(a[1:], b) + 1, plain(a, b[1:]) + 1)

    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (rng.integers(0, 3, rng.integers(0, 6)).tolist() for _ in range(2))
        assert distance(a, b) == plain(a, b) == distance(b, a)


def test_shares_come_with_wilsons_interval() -> None:
    assert share(0, 0)["share"] is None
    # Agresti and Coull 1998, table of Wilson's intervals: 10 of 10, and 0 of 1,000
    assert share(10, 10)["low"] == pytest.approx(0.7225, abs=1e-4)
    assert all(share(0, n)["low"] == 0 and share(n, n)["high"] == 1 for n in (1, 7, 300, 1000))
    assert share(0, 1000)["high"] == pytest.approx(0.00383, abs=1e-5)


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> Iterator[None]:
    """In bfloat16 a rough network's likeliest tokens are often two, and which is taken depends on the batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "fast_dtype", lambda device="cpu": torch.float32)
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and text that it writes itself: word for word, with 5 tokens changed, with 6 changed."""
    place = tmp_path_factory.mktemp("known")
    save(network(), small_tokenizer(), place / "model")
    model, _ = load(place / "model")
    documents = []
    for number, changes in enumerate((0, 5, 6)):
        row = [small_tokenizer().bos_id, *ids(PROMPT, number)]
        with torch.no_grad():
            for _ in range(ANSWER):
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        for change in range(changes):
            row[-1 - 7 * change] = row[-1 - 7 * change] % 319 + 1
        documents.append(row[1:])
    dataset(place / "known", documents[:2], "poems")
    dataset(place / "unknown", [documents[2], ids(LENGTH, 9)], "prose")
    return place


def config(known: Path, out: Path, **more: Any) -> MemorizationConfig:
    return MemorizationConfig(str(known / "model"), (str(known / "known"), str(known / "unknown")), str(out), **more)


def test_what_the_model_knows_is_found_by_source_and_kept(
    known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(known, tmp_path / "out"))
    written = (tmp_path / "out" / "results.json").read_bytes()
    result = json.loads(written)
    assert (result["all"]["exact"]["count"], result["all"]["approximate"]["count"]) == (1, 2)
    assert result["by_source"]["poems"]["approximate"]["count"] == result["by_source"]["poems"]["exact"]["of"] == 2
    assert result["by_source"]["prose"]["approximate"]["count"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "memorized.jsonl").read_text().splitlines()]
    assert [(line["source"], line["start"], line["distance"]) for line in lines] == [("poems", 1, 0), ("poems", 103, 5)]

    # What is answered is not asked again; half an answer is.
    answers = tmp_path / "out" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-20])
    asked: list[int] = []
    own = Engine.run

    def counting(self: Engine, requests: Any) -> Any:
        listed = list(requests)
        asked.append(len(listed))
        return own(self, listed)

    monkeypatch.setattr(Engine, "run", counting)
    run(config(known, tmp_path / "out"))
    assert asked == [1]
    assert (tmp_path / "out" / "results.json").read_bytes() == written


def test_bad_input_is_answered_in_one_line(known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(known / "model"), ["--data", str(known / "known")]
    save(network(seed=1), small_tokenizer(), tmp_path / "other")
    dataset(tmp_path / "short", [ids(LENGTH - 1, 0)])
    write_dataset(_texts(tmp_path), small_tokenizer(300), tmp_path / "foreign", heldout_fraction=0, workers=1)
    shutil.copytree(known / "known", tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-300] + b"\xff" * 300)  # of its tokens, at two bytes each
    run(config(known, tmp_path / "out", samples=2))
    capsys.readouterr()
    for words, line in (
        ([model], "no value"),
        ([model, *data, "--samples", "0"], "samples is 0; give a number from 1 up"),
        ([model, *data, "--seed", "-1"], "seed is -1; give a number from 0 up"),
        ([model, "--data", str(tmp_path / "none")], "holds no data set"),
        ([model, "--data", str(tmp_path / "damaged")], "damaged: holds an id outside the vocabulary of 384; make"),
        ([model, "--data", str(tmp_path / "short")], "no document has 100 tokens"),
        ([model, "--data", str(tmp_path / "foreign" / "train")], "was encoded with tokenizer"),
        ([model, *data, "--names", "no_such_pipeline"], "there is no spaCy pipeline 'no_such_pipeline'"),
        ([str(tmp_path / "other"), *data, "--out", str(tmp_path / "out")], "holds the answers of another model"),
    ):
        out = [] if "--out" in words else ["--out", str(tmp_path / "new")]
        assert cli.main(["eval", "memorization", *words, *out]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert line in said[-1]


@pytest.mark.parametrize("answer", [None, "a", [1], [[1]] * ANSWER, [-1] * ANSWER, [0.5] * ANSWER])
def test_kept_answers_that_are_none_are_refused(known: Path, tmp_path: Path, answer: object) -> None:
    run(config(known, tmp_path))
    head, first, *rest = (tmp_path / "answers.jsonl").read_text().splitlines()
    changed = json.dumps(json.loads(first) | {"answer": answer})
    (tmp_path / "answers.jsonl").write_text("\n".join([head, changed, *rest, ""]))
    with pytest.raises(Error, match=r"answers.jsonl: has .* which is no answer to that"):
        run(config(known, tmp_path))


def _texts(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("".join(TEXT))
    return folder / "texts"


def test_the_engine_reads_what_a_window_needs(known: Path, tmp_path: Path) -> None:
    save(Transformer(replace(SMALL, max_position=LENGTH)), small_tokenizer(), tmp_path / "short")
    with pytest.raises(Error, match="before it have 101 tokens, the model reads 100"):
        run(MemorizationConfig(str(tmp_path / "short"), (str(known / "known"),), str(tmp_path / "out")))


@pytest.mark.slow
def test_text_is_memorized_the_more_often_it_was_repeated(tmp_path: Path) -> None:
    """A miniature reads planted passages once, 10 and 100 times in each of two passes, and others never."""
    found = planted(tmp_path)
    print("\n" + cli.figures(found))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["written"] == str(tmp_path / "out" / "results.json")
    exact, approximate = (
        {n: r[kind]["share"] for n, r in result["by_source"].items()} for kind in ("exact", "approximate")
    )
    assert exact["unseen"] == approximate["unseen"] == 0
    assert exact["once"] <= exact["ten times"] - 0.2
    assert exact["ten times"] <= exact["a hundred times"] - 0.05
    assert exact["a hundred times"] > 0.9
    assert all(approximate[name] >= exact[name] for name in exact)
    personal = result["personal"]
    assert personal["any"]["share"] > 0.4
    assert personal["by_severity"]["high"]["count"] == personal["by_kind"]["CREDIT_CARD"]["count"] > 0
    assert {"EMAIL_ADDRESS", "PHONE_NUMBER", "STREET_ADDRESS"} <= personal["by_kind"].keys()


def planted(folder: Path) -> dict[str, Any]:
    """Train a miniature on the planted corpus and measure what it knows by heart."""
    write_corpus(folder / "text")
    words = train_tokenizer(topics.values(), folder / "tokenizer", 1024)
    data = write_dataset(folder / "text" / "train", words, folder / "data", heldout_fraction=0, workers=1).train
    for kind in REPEATS:
        write_dataset(folder / "text" / kind, words, folder / kind, heldout_fraction=0, workers=1)
    train(
        TrainConfig(
            run=str(folder / "run"),
            data=DataChoice([SourceConfig(str(folder / "data"))], window=256, tokenizer=str(folder / "tokenizer")),
            model=ModelChoice(preset="mini-1m"),
            tokens=2 * data.num_tokens,
            windows_per_step=4,
            micro_windows=4,
            optimizer=OptimizerConfig(learning_rate=0.02, embedding_rate=0.03),
            schedule=ScheduleConfig(final=0.0),
        )
    )
    folders = tuple(str(folder / kind / "train") for kind in REPEATS)
    return run(MemorizationConfig(str(folder / "run" / "model"), folders, str(folder / "out"), samples=400))
