"""Text to ids and back, byte for byte, whatever the text says."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers

from gemstill.core import files
from gemstill.core.errors import Error

SPACE = "▁"  # U+2581, how SentencePiece spells a space inside its pieces
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
LONG = 1 << 20  # characters above which a text is encoded in parts: an encoding takes some 100 bytes a token

_SURROGATE = re.compile("[\ud800-\udfff]")
# A SentencePiece piece is all spaces, or has at most one, in front; then no piece reaches over the
# place where spaces begin, and a text may be cut there without changing its ids.
_PIECE = re.compile(f"{SPACE}+|{SPACE}?[^{SPACE}]+")


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
        added = self._fast.get_added_tokens_decoder().values()
        self._added = {token.content for token in added}
        controls = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, controls))})")
        self._fast.encode_special_tokens = True  # the library's way to say: as text
        self._space_bytes = self._bytes_of_space()
        self._cuttable = self._cut_at_spaces()

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
        """The ids of each text; the `tokenizers` library spreads a batch over the machine's cores."""
        parts: list[str] = []
        plans: list[list[list[int] | None]] = []  # per text: ids that are known, None for the next part's
        for text in texts:
            plans.append([])
            for piece in self._pieces(text if text.isascii() else valid_text(text), special):
                if isinstance(piece, str):
                    parts.append(piece)
                plans[-1].append(None if isinstance(piece, str) else piece)
        encoded = iter(self._fast.encode_batch_fast(parts, add_special_tokens=False))
        result: list[list[int]] = []
        for plan in plans:
            ids = [next(encoded).ids if known is None else known for known in plan]
            result.append(ids[0] if len(ids) == 1 else list(itertools.chain.from_iterable(ids)))
        return result

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of `ids`; special: spell out control tokens, or leave them away. Broken UTF-8 gives U+FFFD."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=not special)
        return text

    def _pieces(self, text: str, special: bool) -> Iterator[str | list[int]]:
        """A text in pieces that are encoded alone, and the ids of what the library would read otherwise."""
        for index, part in enumerate(self._special.split(text) if special else [text]):
            if index % 2:
                found = self.token_id(part)
                assert found is not None
                yield [found]
                continue
            for number, piece in enumerate(part.split(SPACE) if self._space_bytes else [part]):
                if number:
                    yield self._space_bytes
                yield from self._cut(piece)

    def _cut(self, text: str) -> Iterator[str]:
        """Cut a long text where spaces begin, where a cut cannot change the ids."""
        start = 0
        while self._cuttable and len(text) - start > LONG:
            cut = start + LONG
            while cut < len(text) and not (text[cut] == " " and text[cut - 1] != " "):
                cut += 1
            yield text[start:cut]
            start = cut
        yield text[start:]

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
        """The byte pieces of U+2581, empty where the tokenizer has none or keeps the character by itself."""
        ids = [self.token_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        plain = self._fast.encode(SPACE, add_special_tokens=False).ids
        if None in ids or self._fast.decode(plain) == SPACE:
            return []
        return [id for id in ids if id is not None]

    def _cut_at_spaces(self) -> bool:
        """Where no piece reaches over the beginning of spaces, let the library cut there: words are cached, so
        that it runs several times as fast with the same ids."""
        normalizer, pre = self._fast.normalizer, self._fast.pre_tokenizer
        if not self._space_bytes or normalizer is None or not isinstance(pre, pre_tokenizers.Split | None):
            return False
        if normalizer.normalize_str("a  b\n c") != f"a{SPACE * 2}b\n{SPACE}c":
            return False
        pieces = (piece for piece in self._fast.get_vocab() if piece not in self._added)
        if any(" " in token for token in self._added) or not all(map(_PIECE.fullmatch, pieces)):
            return False
        self._fast.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(f"{SPACE}+"), "merged_with_next")
        return True
