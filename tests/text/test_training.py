"""What a trained tokenizer is made of."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gemstill.core.errors import Error
from gemstill.text.tokenizer import SPACE, Tokenizer
from gemstill.text.training import CONTROL, SENTENCE, _sampled, _sentences, train_tokenizer
from tests.text.conftest import corpus


@pytest.fixture(scope="module")
def model(folder: Path) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    return proto


def test_made_as_the_reports_is(model: sentencepiece_model_pb2.ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    assert trainer.model_type == trainer.BPE
    assert trainer.byte_fallback
    assert trainer.split_digits
    assert trainer.allow_whitespace_only_pieces
    assert normalizer.name == "identity"
    assert not normalizer.remove_extra_whitespaces
    assert not normalizer.add_dummy_prefix


def test_pieces(model: sentencepiece_model_pb2.ModelProto) -> None:
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [(piece.piece, piece.type) for piece in model.pieces]
    assert [piece for piece, _ in pieces[:6]] == list(CONTROL)
    assert {kind for _, kind in pieces[:6]} == {kinds.CONTROL, kinds.UNKNOWN}
    assert [piece for piece, kind in pieces if kind == kinds.BYTE] == [f"<0x{byte:02X}>" for byte in range(256)]
    normal = [piece for piece, kind in pieces if kind == kinds.NORMAL]
    assert any(re.fullmatch(f"{SPACE}{{4,}}", piece) for piece in normal), "runs of spaces have pieces"
    assert "\n" in normal
    assert "\t" in normal
    assert not [piece for piece in normal if re.search(r"\d.|.\d", piece)], "digits stand alone"
    for control in CONTROL:
        # llama.cpp would join two such pieces to the control token, in a user's text.
        halves = [(control[:cut], control[cut:]) for cut in range(1, len(control))]
        assert not [pair for pair in halves if pair[0] in normal and pair[1] in normal]


def test_size_is_rounded_up(tokenizer: Tokenizer, folder: Path) -> None:
    assert tokenizer.vocab_size == 1024  # asked for 1000, a multiple of 64
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.get_piece_size() == 1024


def test_made_again_it_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Also from the same documents in another order: nothing depends on how a file system lists them."""
    shuffled = corpus()
    random.Random(0).shuffle(shuffled)
    train_tokenizer(iter(shuffled), tmp_path / "again", 1024)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_sample_is_by_hash() -> None:
    texts = [f"document {number}" for number in range(1000)]
    chosen = _sampled(texts, 3000)
    assert sum(map(len, chosen)) <= 3000
    assert chosen == _sampled(reversed(texts), 3000)
    assert set(_sampled(texts, 1500)) < set(chosen)
    numbers = [int(text.split()[1]) for text in chosen]
    assert 400 < sum(numbers) / len(numbers) < 600, "from everywhere alike"


def test_sentences_lose_nothing() -> None:
    texts = ["word " * 5000, "x" * 9999, "", "short"]
    cut = list(_sentences(texts))
    assert "".join(cut) == "".join(texts)
    assert max(map(len, cut)) <= SENTENCE


def test_lone_surrogates_and_nul_do_not_stop_training(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([*corpus(), "a\ud800b\0c"], tmp_path / "made", 512)
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


@pytest.mark.parametrize(
    ("texts", "size", "match"),
    [([], 1000, "vocabulary of 1000"), (["too little"], 1000, "vocabulary of 1000"), (["abc"], 100, "too small")],
)
def test_too_little_is_refused(tmp_path: Path, texts: list[str], size: int, match: str) -> None:
    with pytest.raises(Error, match=match):
        train_tokenizer(texts, tmp_path / "made", size)
    assert not (tmp_path / "made").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(Error, match=r"thesis\.txt"):
        train_tokenizer(corpus(), tmp_path, 512)
    assert (tmp_path / "thesis.txt").exists()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("")
    with pytest.raises(Error, match="is a file where a folder"):
        train_tokenizer(corpus(), tmp_path / "made", 512)


def test_a_place_that_cannot_be_written() -> None:
    with pytest.raises(Error, match="cannot be written"):
        train_tokenizer(corpus(), "/proc/gemstill/made", 512)
