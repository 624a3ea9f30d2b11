"""`teach`: the right distribution at the right row, the same bytes whatever happened on the way, refusals by name."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gemstill.checkpoint.source import load, save
from gemstill.core import config as configuration
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.shards import write_dataset
from gemstill.distill import teach as module
from gemstill.distill.block import block_path
from gemstill.distill.store import Store
from gemstill.distill.teach import TeachConfig, begin, describe, plan, run, teach_block, teach_model
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

VOCAB, PADDED, TOKENS, WINDOW = 50, 56, 413, 16


class Stream:
    """A data set in memory: three documents of random tokens."""

    vocab_size, bos_id, tokenizer_fingerprint, fingerprint = VOCAB, 2, "a" * 64, "b" * 64
    num_tokens = TOKENS
    document_starts = np.array([0, 100, 203])

    def __init__(self):
        self.tokens = np.random.default_rng(3).integers(0, VOCAB, TOKENS)

    def read(self, start, stop):
        return self.tokens[start:stop]


def tiny(vocab=PADDED, seed=0):
    config = ModelConfig(vocab, 32, 64, 2, 2, 1, 16, query_pre_attn_scalar=16, sliding_window=8)
    model = Transformer(config, seed=seed)
    with torch.no_grad():  # sharper than at the start of training, so that entries differ in kind
        model.embed_tokens.weight.mul_(4)
    return model


def settings(**changes):
    return {"estimator": "threshold(0.1)", "window": WINDOW, "block_tokens": 160, "batch": 3} | changes


def contents(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def teacher_rows(model, stream, temperature=1.0):
    """Every row one by one: the window up to the token, which begins with bos, and its own document alone."""
    rows = []
    for i in range(TOKENS):
        first = max(i - i % WINDOW, int(stream.document_starts[stream.document_starts <= i].max()))
        seen = torch.from_numpy(stream.tokens[first : i + 1].copy())
        if first % WINDOW == 0:
            seen[0] = stream.bos_id
        logits = model(seen[None])[0, -1, :VOCAB]
        rows.append((logits / temperature).softmax(0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_row_is_the_teachers_in_its_document_and_window(tmp_path, temperature):
    model, stream = tiny(), Stream()
    info = describe(model, stream, **settings(estimator="topk(50)", temperature=temperature), teacher="tiny")
    store = teach_model(model, stream, tmp_path, info)
    ids, probs, _ = store[:]
    stored = torch.zeros(TOKENS, VOCAB).scatter_add_(1, ids, probs)
    torch.testing.assert_close(stored, teacher_rows(model, stream, temperature), rtol=0, atol=1 / 256 + 1e-5)
    assert (store.info.stored_vocab_size, store.info.vocab_size) == (PADDED, VOCAB)
    store.verify()


@pytest.mark.parametrize("estimator", ["threshold(0.1)", "sample(20)"])
def test_the_mean_over_seeds_is_the_teachers_distribution(tmp_path, estimator):
    model, stream = tiny(), Stream()
    mean, seeds = torch.zeros(TOKENS, VOCAB), 24
    for seed in range(seeds):
        info = describe(model, stream, **settings(estimator=estimator, seed=seed))
        ids, probs, _ = teach_model(model, stream, tmp_path / str(seed), info)[:]
        mean.scatter_add_(1, ids, probs / seeds)
    known = teacher_rows(model, stream)
    # The variance of an entry is at most p·w, with w = 0.1 and 0.05 the largest weight of a drawn entry.
    error = (known * 0.1 / seeds).sqrt()
    score = ((mean - known) / error.clamp(min=1e-6))[known > 0.02]
    assert float(score.abs().max()) < 6
    assert abs(float(score.mean())) < 0.1


def test_bytes_depend_on_teacher_block_and_seed_alone(tmp_path):
    model, stream = tiny(), Stream()
    info = describe(model, stream, **settings())
    teach_model(model, stream, tmp_path / "a", info)
    (tmp_path / "b").mkdir()
    begin(tmp_path / "b", info, stream)
    for block in (2, 0):  # out of order, as another worker would
        teach_block(model, stream, tmp_path / "b", info, block)
    with pytest.raises(Error, match="not finished"):
        Store.open(tmp_path / "b")
    teach_model(model, stream, tmp_path / "b", info)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {
        "README.md", "code.safetensors", "store.json", *(f"data/block-00000{i}.safetensors" for i in range(3))
    }  # fmt: skip
    other = teach_model(model, stream, tmp_path / "c", describe(model, stream, **settings(seed=1)))
    assert other.digests != Store.open(tmp_path / "a").digests
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*") if path.name != ".lock"}
    teach_model(model, stream, tmp_path / "a", info)  # finished: nothing is written again
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_teacher_that_gives_nan_is_named_with_its_block_and_nothing_is_written(tmp_path):
    model, stream = tiny(), Stream()
    with torch.no_grad():
        model.embed_tokens.weight[int(stream.tokens[200])] = float("nan")
        model.lm_head = torch.nn.Linear(32, PADDED, bias=False)
    seen = np.flatnonzero(stream.tokens == stream.tokens[200])[0] // 160
    with pytest.raises(Error, match=f"broken, block {seen} .*not finite"):
        teach_model(model, stream, tmp_path, describe(model, stream, **settings(), teacher="broken"))
    assert not block_path(tmp_path, int(seen)).exists()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"window": 8}, {"estimator": "topk(4)"}, {"batch": 4}, {"temperature": 1.5}]
)
def test_a_store_begun_with_other_settings_is_refused_with_the_difference(tmp_path, change):
    model, stream = tiny(), Stream()
    begin(tmp_path, describe(model, stream, **settings()), stream)
    ((name, value),) = change.items()
    with pytest.raises(Error, match=f"{name} .* became {value}".replace("(", r"\(").replace(")", r"\)")):
        teach_model(model, stream, tmp_path, describe(model, stream, **settings(**change)))


def test_another_teacher_of_the_same_shape_is_refused(tmp_path):
    stream = Stream()
    begin(tmp_path, describe(tiny(), stream, **settings()), stream)
    with pytest.raises(Error, match="teacher_fingerprint"):
        teach_model(tiny(seed=1), stream, tmp_path, describe(tiny(seed=1), stream, **settings()))


def test_a_foreign_folder_is_refused(tmp_path):
    model, stream = tiny(), Stream()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Error, match=r"thesis\.txt"):
        teach_model(model, stream, tmp_path, describe(model, stream, **settings()))


@pytest.mark.parametrize(
    "change",
    [{"window": 0}, {"block_tokens": 100}, {"temperature": -1.0}, {"precision": "fp8"}, {"estimator": {"name": "best"}},
     {"estimator": {"name": "threshold", "parameter": -0.1}}, {"windw": 3}, {"batch": "many"}],
)  # fmt: skip
def test_a_bad_recipe_is_refused(tmp_path, change):
    with pytest.raises(Error):
        configuration.parse(TeachConfig, {"teacher": "t", "data": "d", "output": "o", "window": 64} | change)


def test_a_small_model_is_refused(tmp_path):
    with pytest.raises(Error, match="vocabulary of 40, the data set one of 50"):
        describe(tiny(40), Stream())
    with pytest.raises(Error, match="no whole number of windows"):
        describe(tiny(), Stream(), window=100)
    with pytest.raises(Error, match="dense"):
        describe(tiny(), Stream(), estimator="dense")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer, a data set of real text and a (random) teacher of a padded vocabulary with a card, on disk."""
    root = tmp_path_factory.mktemp("folders")
    texts = [Path(module.__file__).with_name(f"{name}.py").read_text() for name in ("teach", "store", "estimators")]
    (root / "text").mkdir()
    for number, text in enumerate(texts):
        (root / "text" / f"{number}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, root / "tokenizer", 400)
    write_dataset(root / "text", tokenizer, root / "data", heldout_fraction=0, workers=1)
    save(tiny(416), tokenizer, root / "teacher", card="---\ntags: [x]\nlicense: gemma\n---\n# A teacher\n")
    return root


def test_from_folders_to_a_folder(folders, tmp_path):
    recipe = {"teacher": str(folders / "teacher"), "data": folders / "data" / "train", "output": tmp_path / "store",
              "window": 32, "block_tokens": 2048, "estimator": {"name": "threshold", "parameter": 0.1}}  # fmt: skip
    config = configuration.parse(TeachConfig, recipe, ["precision=float32"])
    figures = plan(config)
    assert not config.output.exists()
    store = run(config)
    dataset = TokenDataset.open(folders / "data" / "train")
    tokenizer = Tokenizer.open(folders / "tokenizer")
    again = Store.open(config.output, dataset, tokenizer, vocab_size=416, window=32)
    assert again.info == store.info
    assert (store.info.teacher, store.info.teacher_licence, store.info.precision) == ("teacher", "gemma", "float32")
    assert (store.vocab_size, store.info.stored_vocab_size) == (400, 416)
    assert figures["tokens"] == len(store) == dataset.num_tokens
    assert figures["blocks"] == store.info.num_blocks == -(-len(store) // 2048)
    assert plan(config)["flops"] == 0
    assert store.bytes_per_token < 1.2 * figures["bytes_per_token_about"] + 5000 / len(store) * store.info.num_blocks
    card = (config.output / "README.md").read_text()
    assert card.startswith("---\nlicense: gemma\n")
    assert dataset.fingerprint in card
    known = (
        load(folders / "teacher", dtype=torch.float32)[0](torch.from_numpy(dataset.read(0, 32))[None])[0, :, :400]
        .softmax(1)
        .detach()
    )
    target = store[0:32]
    stored = torch.zeros(32, 400).scatter_add_(1, target.ids, target.probs)
    heavy = known >= 0.1
    torch.testing.assert_close(stored[heavy], known[heavy], rtol=0, atol=1 / store.info.units + 1e-5)


def test_a_teacher_of_another_tokenizer_is_refused_and_both_named(folders, tmp_path):
    other = train_tokenizer([Path(__file__).read_text()], tmp_path / "tokenizer", 400)
    save(tiny(416), other, tmp_path / "teacher")
    config = TeachConfig(str(tmp_path / "teacher"), folders / "data" / "train", tmp_path / "store")
    dataset = TokenDataset.open(folders / "data" / "train")
    with pytest.raises(Error, match=f"{other.fingerprint[:16]}.*{dataset.tokenizer_fingerprint[:16]}"):
        run(config)
    assert not config.output.exists()


def test_a_teacher_without_rows_for_the_last_entries(tmp_path):
    """Gemma 3's tokenizer has one entry more than the model has rows: a mark for images, which no text has."""
    stream = Stream()
    last = int(stream.tokens.max())
    stream.tokens[stream.tokens == last] = 0
    info = describe(tiny(last), stream, **settings(), teacher="short")
    assert (info.vocab_size, info.stored_vocab_size) == (last, last)
    store = teach_model(tiny(last), stream, tmp_path / "store", info)
    assert int(store[:].ids.max()) < last
    dataset = SimpleNamespace(vocab_size=VOCAB, fingerprint=stream.tokenizer_fingerprint)
    assert Store.open(tmp_path / "store", tokenizer=dataset).info == info
    stream.tokens[200] = last
    with pytest.raises(Error, match=f"short: has {last} rows and none for the entry {last} of its tokenizer"):
        describe(tiny(last), stream, **settings(), teacher="short")
