"""A tokenizer.json from a stranger: parts that never end or take all memory are refused before they run."""

import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from gemstill.core.errors import Error
from gemstill.text.pipeline import REGEXES, check_file, check_parts
from gemstill.text.tokenizer import Tokenizer
from tests.model.tokenizers import small_tokenizer


def changed(**parts) -> bytes:
    return json.dumps(json.loads(small_tokenizer().data) | parts).encode()


def split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, split("(?i)" + "ſß" * 9)]}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)*b"}, "content": ""}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [{"type": "Replace", "pattern": {"Regex": "a*a*a*b"}, "content": ""}],
            }
        },
    ],
)
def test_what_would_hang_or_abort_while_it_is_read(parts):
    data = changed(**parts)
    escaped = data.replace(b'"Regex"', b'"\\u0052egex"').replace(b'"Precompiled"', b'"Pre\\u0063ompiled"')
    for file in (data, escaped):
        with pytest.raises(Error, match=r"here: .*(pattern that is not known|map of characters)"):
            check_file(file, "here")


def test_a_name_that_stands_twice_hides_nothing():
    data = changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})
    with pytest.raises(Error, match="twice"):
        check_file(data[:-1] + b', "normalizer": null}', "here")


@pytest.mark.parametrize("data", [changed(), changed(pre_tokenizer=split(min(REGEXES))), b'{"Regex": 1}', b"", b"[]"])
def test_other_files_are_left_to_the_library(data):
    check_file(data, "here")


def doubled(times: int) -> list[dict[str, object]]:
    return [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * times


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Sequence", "normalizers": doubled(7)}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": doubled(4)}] * 2}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 100}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 100}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 100}},
        {"decoder": {"type": "Sequence", "decoders": doubled(7)}},
        {"decoder": {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}] * 17}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}},
        {"model": json.loads(small_tokenizer().data)["model"] | {"dropout": 0.5}},
        {"model": json.loads(small_tokenizer().data)["model"] | {"unk_token": "nope"}},
    ],
)
def test_what_would_grow_or_fail_at_some_texts(parts):
    with pytest.raises(Error, match="here: "):
        check_parts(tokenizers.Tokenizer.from_str(changed(**parts).decode()), "here")


@pytest.mark.parametrize("number", [10_000, 2**31, 5])
def test_every_id_has_a_piece_and_no_other(number):
    model = json.loads(small_tokenizer().data)["model"]
    model["vocab"][max(model["vocab"], key=model["vocab"].__getitem__)] = number
    with pytest.raises(Error, match=r"ids are not 0 to \d+"):
        check_parts(tokenizers.Tokenizer.from_str(changed(model=model).decode()), "here")


def test_parts_of_the_families_around_are_taken():
    fast = tokenizers.Tokenizer.from_str(small_tokenizer().data.decode())
    check_parts(fast, "here")
    fast.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(max(REGEXES)), "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    check_parts(fast, "here")


@pytest.mark.parametrize(
    "part",
    [split("(a+)+$"), {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 17}],
)
def test_opening_a_tokenizer_checks_it(part, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(changed(pre_tokenizer=part))
    with pytest.raises(Error, match=r"tokenizer\.json: .*(pattern|parts)"):
        Tokenizer.open(tmp_path)
