"""The same ids as everyone's, and every text back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemstill.core.errors import Error
from gemstill.text.tokenizer import SPACE, Tokenizer, valid_text
from gemstill.text.training import CONTROL
from tests.text import texts
from tests.text.conftest import corpus

settings.register_profile("text", max_examples=300, deadline=None)
settings.load_profile("text")


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def raw(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        return transformers.AutoTokenizer.from_pretrained(folder)


@given(text=texts.every)
@example("\0")
@example("a\r\n\tb\n\n\n  c")
@example(f"{SPACE}{SPACE} {SPACE}a {SPACE}")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(id >= len(CONTROL) for id in ids), "text never encodes to a control token"


@given(text=texts.comparable)
def test_ids_are_those_of_sentencepiece_tokenizers_and_transformers(
    tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor, raw: tokenizers.Tokenizer, auto, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert processor.encode(text) == ids
    assert raw.encode(text, add_special_tokens=False).ids == ids
    assert auto(text, add_special_tokens=False).input_ids == ids
    assert processor.decode(ids) == text


def test_ids_of_real_text_are_everyones(tokenizer: Tokenizer, processor, raw, auto) -> None:
    documents = [text for text in corpus() if SPACE not in text]
    ids = tokenizer.encode_batch(documents)
    assert processor.encode(documents) == ids
    assert [encoding.ids for encoding in raw.encode_batch(documents, add_special_tokens=False)] == ids
    assert auto(documents, add_special_tokens=False).input_ids == ids
    assert [tokenizer.decode(each) for each in ids] == documents


@given(text=texts.spelled)
def test_control_tokens_in_a_text_are_text(tokenizer: Tokenizer, processor, text: str) -> None:
    """A user who writes <end_of_turn> must not end the turn. SentencePiece reads it as we do."""
    assert tokenizer.encode(text) == processor.encode(text)


@given(pieces=st.lists(texts.comparable | st.sampled_from(CONTROL), max_size=8))
def test_templates_may_ask_for_control_tokens(
    tokenizer: Tokenizer, raw: tokenizers.Tokenizer, pieces: list[str]
) -> None:
    text = "".join(pieces)
    assert tokenizer.encode(text, special=True) == raw.encode(text, add_special_tokens=False).ids


def test_control_tokens_have_gemmas_places(tokenizer: Tokenizer, auto) -> None:
    assert [tokenizer.token_id(token) for token in CONTROL] == list(range(6))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (auto.pad_token_id, auto.eos_token_id, auto.bos_token_id, auto.unk_token_id) == (0, 1, 2, 3)
    assert len(auto) == tokenizer.vocab_size == 1024
    assert tokenizer.decode([2, *tokenizer.encode("hi"), 1], special=False) == "hi"


def test_bos_is_there_once_and_only_when_asked_for(tokenizer: Tokenizer, raw, auto) -> None:
    ids = tokenizer.encode("x = 1")
    assert 2 not in ids
    assert raw.encode("x = 1").ids == [2, *ids]
    assert auto("x = 1").input_ids == [2, *ids]


def test_chat_template_of_gemma_turns(tokenizer: Tokenizer, auto) -> None:
    talk = [
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    text = auto.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    turn = "<start_of_turn>{}\n{}<end_of_turn>\n".format
    assert text == "<bos>" + turn("user", "hi") + turn("model", "ho") + turn("user", "?") + "<start_of_turn>model\n"
    assert tokenizer.encode(text, special=True) == auto(text, add_special_tokens=False).input_ids
    with pytest.raises(Exception, match="System role"):
        auto.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert valid_text("a\ud800b\udfff") == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_long_texts_have_the_same_ids(tokenizer: Tokenizer, processor) -> None:
    text = "".join(text for text in corpus() if SPACE not in text) * 10
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.encode("a" * 10_000) == processor.encode("a" * 10_000)
    assert tokenizer.encode(" " * 10_000) == processor.encode(" " * 10_000)


def test_remembered_words_are_forgotten_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemstill.text.tokenizer.CACHE", 5000)
    ours = Tokenizer.open(folder)
    text = corpus()[0]
    first = ours.encode(text)
    assert ours._cached > 5000
    assert ours.encode("x") == Tokenizer.open(folder).encode("x")
    assert ours._cached < 10
    assert ours.encode(text) == first


def test_batches_keep_their_order_and_empty_texts(tokenizer: Tokenizer) -> None:
    batch = ["", "one", f"{SPACE}two", "", "three"]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
    assert tokenizer.encode("") == []


def test_saved_again_it_is_the_same(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    again = Tokenizer.open(tmp_path / "copy" / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    again.save(tmp_path / "copy")


def test_other_peoples_tokenizers_open_with_their_ids(tmp_path: Path) -> None:
    """Byte-level BPE without byte pieces: nothing of ours may get in its way."""
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(corpus(), vocab_size=400, special_tokens=["<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.open(tmp_path)
    text = f"a  b{SPACE} Äpfel\n </s>"
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 1)
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode("a  b") == fast.encode("a  b").ids


@pytest.mark.parametrize(
    ("left", "right", "text", "cut"),
    [
        ("a", f"{SPACE}a", "a a a", False),  # over a space: whole texts
        (".", "a", "a.a .a", True),  # punctuation and letter: words of both
        (")", f"{SPACE}(", "a) (b) (( ) (", True),  # over a space, from punctuation to punctuation
        ("l", "o", "hello lo", True),  # as SentencePiece makes them
    ],
)
def test_texts_are_cut_only_where_no_piece_reaches_over(
    folder: Path, tmp_path: Path, left: str, right: str, text: str, cut: bool
) -> None:
    """The speed-up by cutting into words is exact only where no piece spans a cut; others go without it."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"].setdefault(left + right, len(data["model"]["vocab"]))
    data["model"]["merges"] = [[left, right], *data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    ours = Tokenizer.open(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (ours._cut is not None) == cut
    for each in (text, *corpus()):
        if SPACE not in each:
            assert ours.encode(each) == raw.encode(each, add_special_tokens=False).ids
            assert ours.decode(ours.encode(each)) == each


@pytest.mark.parametrize("content", [None, "", "{}", "not json", '{"model": 3}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(Error, match=r"tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_without_control_tokens_it_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Error, match="control tokens"):
        Tokenizer.open(tmp_path)
