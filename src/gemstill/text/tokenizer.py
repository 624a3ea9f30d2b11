"""Text to ids and back, byte for byte, whatever the text says."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import models

from gemstill.core import files
from gemstill.core.errors import Error

SPACE = "▁"  # U+2581, how SentencePiece spells a space inside its pieces
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
CACHE = 1 << 23  # characters of words whose ids are remembered: text is the same few words again and again

_SURROGATE = re.compile("[\ud800-\udfff]")
# Ways to cut a text into words, the finest first, each with the shape that all pieces of a vocabulary
# must have: then none reaches over a cut, and the words' ids one after the other are the text's.
# SentencePiece's training keeps letters apart from punctuation, and spaces in front.
_LETTER, _OTHER = r"[A-Za-z\x80-\u2580\u2582-\U0010ffff]", r"[\x00-\x1f!-@\[-`{-\x7f]"
_WORDS = [
    (f"{SPACE}+|{SPACE}?{_LETTER}+|{SPACE}?{_OTHER}+", f"{SPACE}| *{_LETTER}+| *{_OTHER}+| +"),
    (f"{SPACE}+|{SPACE}?[^{SPACE}]+", f"{SPACE}| *[^ {SPACE}]+| +"),
]
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_REST, _WHOLE = re.compile(f"{SPACE}|[^{SPACE}]+"), re.compile(r"(?s).+")


def valid_text(text: str) -> str:
    """`text` with each lone surrogate, which no UTF-8 file can hold, replaced by U+FFFD.

    >>> valid_text("a\\ud800b")
    'a\ufffdb'
    """
    return _SURROGATE.sub("\ufffd", text)


class Tokenizer:
    """A tokenizer.json, opened: the same ids as `tokenizers`, `transformers` and SentencePiece give.

    Text is text: a control token spelled out in it is encoded letter by letter, never as the control
    token, unless `special=True` asks for that. No BOS is added. Lone surrogates become U+FFFD; all
    other text comes back exactly from `decode(encode(text))` where the vocabulary has byte pieces. That
    holds for U+2581 too, which SentencePiece itself cannot tell from a space: it goes in as its bytes.
    """

    def __init__(self, data: bytes, source: Path) -> None:
        """Use `open`. data: the bytes of a tokenizer.json found at `source`."""
        try:
            self._fast = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise Error(f"is not a tokenizer.json ({error})", where=source) from error
        self.source = source
        self.data = data
        self.fingerprint: str = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._fast.get_vocab_size()
        self.bos_id: int = self._control("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>")
        self.eos_id: int = self._control("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>")
        self.pad_id: int = self._control("<pad>", "<unk>", default=self.eos_id)
        self.unk_id: int = self._control("<unk>", default=self.pad_id)
        self._fast.no_padding()
        self._fast.no_truncation()
        self._fast.encode_special_tokens = True  # the library's way to say: as text
        added = self._fast.get_added_tokens_decoder().items()
        self._controls = {token.content: id for id, token in added if token.special}
        controls = sorted(self._controls, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, controls)) or '(?!)'})")
        space = self._bytes_of_space()
        self._read_our_way = {SPACE: space} if space else {}
        cut = self._finest_cut()
        self._cuttable = cut is not None
        self._words = cut or (_REST if space else _WHOLE)
        self._known: dict[str, list[int]] = self._read_our_way.copy()
        self._cached = 0  # characters in `_known`

    @staticmethod
    def open(path: str | Path) -> Tokenizer:
        """Open a tokenizer.json, or the folder that holds one.

        Raises:
            Error: there is none, or it cannot be read or understood.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return Tokenizer(file.read_bytes(), file)
        except OSError as error:
            fix = "name a tokenizer.json or a folder with one; `gemstill tokenizer` makes it"
            raise Error(f"no tokenizer can be read here ({error.strerror})", where=file, fix=fix) from error

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files (those of `FILES` that it has) into `folder`. Raises Error when unwritable."""
        folder = Path(folder)
        files.write(folder / "tokenizer.json", self.data)
        for name in FILES[1:]:
            beside = self.source.parent / name
            if beside.is_file() and beside.resolve() != (folder / name).resolve():
                with files.writing(folder / name) as temporary:
                    shutil.copyfile(beside, temporary)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling in the vocabulary, None when it is not there."""
        found: int | None = self._fast.token_to_id(token)
        return found

    @property
    def control_ids(self) -> set[int]:
        """The ids of all control tokens, which no text is made of."""
        return {number for number, token in self._fast.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, without BOS. special: read control tokens spelled in it as such (templates do)."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, several times as fast as one by one."""
        if special:
            return [self._encode_controls(text) for text in texts]
        words = [self._words.findall(text if text.isascii() else valid_text(text)) for text in texts]
        if self._cached > CACHE or not self._cuttable:
            self._known, self._cached = self._read_our_way.copy(), 0
        known = self._known  # ours to the end, should another thread begin a new one
        new = list(set(itertools.chain.from_iterable(words)).difference(known))
        for word, encoding in zip(new, self._fast.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[word] = encoding.ids
        self._cached += sum(map(len, new))
        return [list(itertools.chain.from_iterable(map(known.__getitem__, row))) for row in words]

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of `ids`; special: spell out control tokens, or leave them away. Broken UTF-8 gives U+FFFD."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=not special)
        return text

    def _encode_controls(self, text: str) -> list[int]:
        parts = self._special.split(text)  # text, control token, text, …
        ids: list[int] = []
        for part, control in itertools.zip_longest(self.encode_batch(parts[::2]), parts[1::2]):
            ids += part
            if control is not None:
                ids.append(self._controls[control])
        return ids

    def _control(self, *names: str, default: int | None = None) -> int:
        for name in names:
            found = self.token_id(name)
            if found is not None:
                return found
        if default is None:
            fix = "use a tokenizer that has one"
            raise Error(f"the vocabulary has none of the control tokens {', '.join(names)}", where=self.source, fix=fix)
        return default

    def _bytes_of_space(self) -> list[int]:
        """The byte pieces of U+2581, empty where there are no byte pieces or the character is read as itself."""
        ids = [self.token_id(f"<0x{byte:02X}>") for byte in range(256)]
        plain = self._fast.encode(SPACE, add_special_tokens=False).ids
        if self._fast.decode(plain) == SPACE:
            return []
        found = [id for id in ids if id is not None]
        return [found[byte] for byte in SPACE.encode()] if len(found) == len(ids) else []

    def _finest_cut(self) -> re.Pattern[str] | None:
        """The finest way to cut a text that leaves its ids as they are, None where there is none we know."""
        model, normalizer, pre = self._fast.model, self._fast.normalizer, self._fast.pre_tokenizer
        if not isinstance(model, models.BPE) or model.dropout or model.ignore_merges or not self._read_our_way:
            return None
        if normalizer is None or normalizer.normalize_str("a  b\n c") != f"a{SPACE * 2}b\n{SPACE}c":
            return None
        if pre is not None and json.loads(pre.__getstate__()).get("pattern") != {"String": " "}:
            return None
        tokens = self._fast.get_vocab(with_added_tokens=True)
        pieces = [piece for piece in tokens if piece not in self._controls and not _BYTE.fullmatch(piece)]
        for shape, word in _WORDS:
            if all(map(re.compile(shape).fullmatch, pieces)):
                return re.compile(word)
        return None
