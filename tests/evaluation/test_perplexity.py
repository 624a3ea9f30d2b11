"""Bits per byte against windows written out one by one, and what the command says to bad input."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemstill import cli
from gemstill.checkpoint.source import load, save
from gemstill.core.errors import Error
from gemstill.data.shards import write_dataset
from gemstill.evaluation.config import PerplexityConfig
from gemstill.evaluation.perplexity import Text, run, score, texts_of, windows
from gemstill.model.transformer import Transformer
from tests.infer.networks import SMALL, network
from tests.model.tokenizers import TEXT, small_tokenizer

TEXTS = [TEXT[0], "".join(TEXT[:5]), "straße 🙂", "".join(TEXT[20:23])]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return network().double()


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("perplexity")
    save(network(), small_tokenizer(), place / "model")
    for number, text in enumerate(TEXTS):
        (place / "texts" / str(number)).mkdir(parents=True)
        (place / "texts" / str(number) / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    return place


def texts() -> list[Text]:
    rows = [small_tokenizer().encode(text) for text in TEXTS]
    return [Text(str(n), np.array(ids, np.int32), len(TEXTS[n].encode())) for n, ids in enumerate(rows)]


@torch.no_grad()
def one_by_one(model: Transformer, ids: list[int], context: int) -> float:
    """The document's negative log-likelihood, each token alone: the tokens that its window has before it, read anew."""
    total, half = 0.0, context // 2
    for place, token in enumerate(ids):
        behind = 0 if place < context else half * ((place - context) // half + 1)  # where the token's window begins
        begin = min(behind, max(0, len(ids) - context))  # a last window is moved back to be whole
        row = torch.tensor([[small_tokenizer().bos_id, *ids[begin:place]]])
        total -= float(model(row)[0, -1].log_softmax(0)[token])
    return total


@pytest.mark.parametrize("context", [16, 50, 2048])
def test_each_token_is_scored_once_in_its_window(model: Transformer, context: int) -> None:
    found = score(model, small_tokenizer(), texts(), context=context, batch_tokens=120)
    for number, text in enumerate(texts()):
        due = one_by_one(model, text.ids.tolist(), context)
        assert found.nll[number] == pytest.approx(due, rel=1e-9)
        assert found.tokens[number] == len(text.ids)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(found.nll.sum() / math.log(2) / size)
    assert found.sizes.sum() == found.bytes == size


def test_windows_cover_every_token_once() -> None:
    for count in range(0, 60):
        for context in (2, 3, 8):
            found = [*windows(count, context)]
            assert [place for _, stop, first in found for place in range(first, stop)] == list(range(count))
            assert all(0 <= start <= first and stop - start <= context for start, stop, first in found)
            assert all(first - start >= context // 2 for start, _, first in found[1:])


def test_a_model_that_knows_nothing_takes_the_bits_of_its_vocabulary(model: Transformer) -> None:
    lost = network().double()
    with torch.no_grad():
        assert lost.lm_head is not None
        lost.lm_head.weight.zero_()
    found = score(lost, small_tokenizer(), texts())
    tokens = sum(len(text.ids) for text in texts())
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(lost.config.vocab_size) / found.bytes)
    assert found.perplexity == pytest.approx(lost.config.vocab_size)


def test_folder_jsonl_and_data_set_say_the_same(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"body": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    write_dataset(folder / "texts", small_tokenizer(), tmp_path / "data", heldout_fraction=0, workers=1)
    source = str(folder / "model")
    found = run(PerplexityConfig(source, str(folder / "texts"), out=str(tmp_path / "out.json")))
    for other, field in (("texts.jsonl", "body"), ("data/train", "text")):
        same = run(PerplexityConfig(source, str(tmp_path / other), field=field))
        assert {**same, "texts": ""} == pytest.approx({**found, "texts": ""})
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["bits_per_byte"] == found["bits_per_byte"]
    assert sum(each["nll"] for each in written["each"]) / math.log(2) / found["bytes"] == pytest.approx(
        found["bits_per_byte"]
    )
    assert [each["id"] for each in written["each"]] == [f"{number}/text.txt.gz" for number in range(4)]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantized_model_is_scored_too(tmp_path: Path, quantize: str) -> None:
    save(network(replace(SMALL, hidden_size=64, intermediate_size=128)), small_tokenizer(), tmp_path / "model")
    exact, tokenizer = load(tmp_path / "model")
    packed, _ = load(tmp_path / "model", quantize=quantize)
    whole, part = (score(each, tokenizer, texts()).bits_per_byte for each in (exact, packed))
    assert part == pytest.approx(whole, rel=0.2)


def test_bad_input_is_answered_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(folder / "model")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    for words, line in (
        ([source, str(tmp_path / "none")], "there is no such file or folder"),
        ([source, str(tmp_path / "bad.jsonl")], "bad.jsonl:2: has no text in its field 'text' (it has 'body')"),
        ([source, str(folder / "texts"), "--context", "1"], "context is 1; give a number of tokens from 2 up"),
        ([str(tmp_path), str(folder / "texts")], str(tmp_path)),
    ):
        assert cli.main(["eval", "perplexity", *words]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert line in said[-1]
    with pytest.raises(Error, match="no text to score"):
        score(network(), small_tokenizer(), [])


def test_a_data_set_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = small_tokenizer(300)
    write_dataset(folder / "texts", other, tmp_path / "data", heldout_fraction=0, workers=1)
    config = PerplexityConfig(str(folder / "model"), str(tmp_path / "data" / "train"))
    with pytest.raises(Error, match="was encoded with tokenizer"):
        list(texts_of(config, small_tokenizer()))
