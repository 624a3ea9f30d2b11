"""A teacher behind a real server on this machine: rows as at hand, patience, and one clear line for the rest."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemstill.core import server
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.shards import write_dataset
from gemstill.distill.block import block_path
from gemstill.distill.estimators import Estimator
from gemstill.distill.teach import TeachConfig, describe, plan, run, teach_model
from gemstill.distill.teachers import open_teacher
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

from .served import Fault, Served, half, half_json, hang_up, short, status

WINDOW, BLOCK, K = 32, 96, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a small data set of several short documents."""
    root = tmp_path_factory.mktemp("served")
    (root / "text").mkdir()
    source = Path(server.__file__).read_text()
    tokenizer = train_tokenizer([source], root / "tokenizer", 400)
    for number in range(6):
        (root / "text" / f"{number}.txt").write_text(source[number * 120 : number * 120 + 20 + 25 * number])
    write_dataset(root / "text", tokenizer, root / "data", heldout_fraction=0, workers=1)
    return root


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return Tokenizer.open(root / "tokenizer")


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(416, 32, 64, 2, 2, 1, 16, query_pre_attn_scalar=16, sliding_window=8)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(3)
    return model


@pytest.fixture
def served(model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(server, "PAUSE", 0.002)
    monkeypatch.setattr(server, "TRIES", 4)
    with Served(model, tokenizer) as served:
        yield served


def settings(root: Path, place: str, output: Path, **changes: Any) -> TeachConfig:
    config = TeachConfig(
        place, root / "data" / "train", output, Estimator("topk", K), window=WINDOW, block_tokens=BLOCK, batch=2,
        precision="float32", tokenizer=str(root / "tokenizer"),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("form", ["vllm", "echo"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_store_is_that_of_the_model_at_hand(
    root: Path, model: Transformer, tokenizer: Tokenizer, tmp_path: Path, form: str, temperature: float
) -> None:
    dataset = TokenDataset.open(root / "data" / "train")
    info = describe(model, dataset, estimator=f"topk({K})", window=WINDOW, block_tokens=BLOCK, temperature=temperature)
    known = teach_model(model, dataset, tmp_path / "known", info)
    with Served(model, tokenizer, form=form) as served:
        config = settings(root, served.place, tmp_path / "store", temperature=temperature)
        assert plan(config)["tokens"] == dataset.num_tokens
        store = run(config)
    dense = [torch.zeros(len(x), 400).scatter_add_(1, x[:].ids, x[:].probs) for x in (store, known)]
    unit = float(known[:].probs[known[:].probs > 0].min())
    torch.testing.assert_close(dense[0], dense[1], rtol=0, atol=1.01 * unit)
    assert float((dense[0] - dense[1]).abs().sum()) < 0.02 * len(known)
    assert (store.info.teacher, store.info.teacher_licence, store.info.stored_vocab_size) == (
        "tiny/model",
        "unknown",
        400,
    )
    assert "biased" in (store.folder / "README.md").read_text()


def test_each_document_is_asked_for_alone_and_several_at_once(
    root: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    tokens = torch.arange(2 * 12).reshape(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 4 + [3] + [-1] * 7])
    known = model(tokens, documents=documents)[..., :400].log_softmax(-1).exp().flatten(0, 1)
    with Served(model, tokenizer) as served:
        teacher = open_teacher(served.place, tokenizer.fingerprint, tokenizer=tokenizer, entries=K)
        before = served.completions
        served.together = threading.Barrier(4)  # all four documents, or the server waits in vain
        target = teacher.distribution(tokens, documents)
        assert served.completions - before == 4
    real = (documents >= 0).flatten()
    assert torch.equal(target.weight.bool(), real)
    assert float(target.probs[~real].sum()) == 0
    torch.testing.assert_close(target.probs[real], known.topk(K, 1).values[real], rtol=1e-4, atol=1e-6)
    assert torch.equal(target.ids[real], known.topk(K, 1).indices[real])


def test_what_passes_is_waited_for(root: Path, served: Served, tmp_path: Path) -> None:
    whole = run(settings(root, served.place, tmp_path / "whole"))
    served.faults = [
        None,
        status(429, {"Retry-After": "0.01"}),
        status(500),
        hang_up,
        half,
        half_json,
        short,
        status(503),
    ]
    run(settings(root, served.place, tmp_path / "store"))
    assert not served.faults
    assert contents(tmp_path / "store") == contents(whole.folder)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (status(429), r"answers 429 \(fault 429\), 4 times in a row; .*goes on with what is missing"),
        (status(500), r"answers 500 \(fault 500\), 4 times"),
        (status(404), r"answers 404 \(fault 404\)"),
        (hang_up, "cannot be reached .*4 times"),
        (half, "cannot be reached .*4 times"),
        (half_json, r"gives half an answer \(no JSON\), 4 times"),
        (short, r"gives half an answer \(\d+ places of \d+\), 4 times"),
    ],
    ids=["429", "500", "404", "hang up", "half", "half JSON", "short"],
)
def test_what_does_not_pass_is_told_in_one_line_and_nothing_is_written(
    root: Path, served: Served, tmp_path: Path, fault: Fault, line: str
) -> None:
    config = settings(root, served.place, tmp_path / "store")
    served.faults = [None] + [fault] * 1000
    with pytest.raises(Error, match=f"tiny/model, block 0 .tokens 0 to {2 * WINDOW}.*{line}"):
        run(config)
    assert not block_path(config.output, 0).exists()
    served.faults = []
    run(config)


def test_the_servers_death_costs_one_block_at_most(
    root: Path, model: Transformer, tokenizer: Tokenizer, served: Served, tmp_path: Path
) -> None:
    whole = run(settings(root, served.place, tmp_path / "whole"))
    with Served(model, tokenizer) as dying:
        # The third block's first request is the last that anyone hears of it.
        documents = served.completions
        config = settings(root, dying.place, tmp_path / "store")
        dying.faults = [None] * (documents // 2) + [hang_up] * 1000
        with pytest.raises(Error, match="cannot be reached"):
            run(config)
    written = [block for block in range(whole.info.num_blocks) if block_path(config.output, block).exists()]
    assert 0 < len(written) < whole.info.num_blocks
    with pytest.raises(Error, match=r"cannot be reached \(.*refused"):
        run(config)
    with Served(model, tokenizer) as again:  # at another port
        run(dataclasses.replace(config, teacher=again.place))
    assert contents(config.output) == contents(whole.folder)


def test_other_keys_names_and_forms_are_refused(
    root: Path, model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(served: Served, line: str, place: str = "", **changes: Any) -> None:
        config = settings(root, place or served.place, tmp_path / "store", **changes)
        with pytest.raises(Error, match=line):
            run(config)
        assert not config.output.exists()

    with Served(model, tokenizer, key="secret") as locked:
        refused(locked, r"answers 401 \(Unauthorized\); set GEMSTILL_API_KEY")
        monkeypatch.setenv("GEMSTILL_API_KEY", "secret")
        run(settings(root, locked.place, tmp_path / "unlocked"))
    with Served(model, tokenizer, most=5) as served:
        refused(served, "max allowed: 5.*--max-logprobs 8")
        refused(
            served,
            "has no model 'other'; name one of these after a #: tiny/model",
            served.place.replace("tiny/model", "other"),
        )
        refused(served, r"no threshold\(0.05\) can be made", estimator=Estimator())
        refused(served, "known by comparing tokenizers", tokenizer="")
    with Served(model, tokenizer, form="none") as plain:
        refused(plain, "tells no log-probabilities of a prompt's tokens; serve the model with vLLM")
    with Served(model, tokenizer, form="text") as texts:
        refused(texts, "tells no log-probabilities")
    other = train_tokenizer([Path(__file__).read_text()], tmp_path / "tokenizer", 400)
    with Served(model, other) as strange:
        refused(strange, "has another tokenizer: it makes")


def test_answers_for_another_model_or_that_are_no_probabilities(
    root: Path, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def renamed(_: object, content: dict) -> bool:  # type: ignore[type-arg]
        content["model"] = "another"
        return False

    def nan(_: object, content: dict) -> bool:  # type: ignore[type-arg]
        next(iter(content["choices"][0]["prompt_logprobs"][1].values()))["logprob"] = float("nan")
        return False

    for fault, line in ((renamed, "answers for the model 'another', not for 'tiny/model'"), (nan, "that are none")):
        with Served(model, tokenizer) as served:
            served.faults = [None, fault]
            config = settings(root, served.place, tmp_path / "store")
            with pytest.raises(Error, match=f"block 0 .*{line}"):
                run(config)
        assert not block_path(config.output, 0).exists()


def test_the_only_model_needs_no_name(served: Served, tokenizer: Tokenizer) -> None:
    place = served.place.partition("#")[0]
    assert open_teacher(place, tokenizer.fingerprint, tokenizer=tokenizer, entries=K).name == "tiny/model"
    with pytest.raises(Error, match="is no address"):
        open_teacher("http://#x", tokenizer.fingerprint, tokenizer=tokenizer, entries=K)
