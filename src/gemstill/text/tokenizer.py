"""Text to ids and back, byte for byte, whatever the text says."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from gemstill.core import files
from gemstill.core.allocator import give_back_freed_memory
from gemstill.core.errors import Error
from gemstill.text import settings
from gemstill.text.pipeline import NORMALIZER, check_file, check_parts, plain_state
from gemstill.text.table import VERSION, Table
from gemstill.text.vocabulary import (
    BYTES,
    CONTROL,
    LARGEST,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    from_json,
    steers,
    whitespace_runs,
)
from gemstill.text.words import SPACE, any_of, finest_cut, whole

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
CACHE = 1 << 23  # characters of words whose ids are remembered: text is the same few words again and again
LITTLE = 1 << 16  # characters
PATIENCE = 1 << 19  # characters encoded little by little, from which on the library is worth its loading
LARGE_FILE = 1 << 20  # bytes of a tokenizer.json
LARGE = 1 << 15  # entries; a vocabulary of 262,144 takes 400 MiB to read and 100 once it is read
MOST_SYMBOLS = 10_000  # user-defined ones, each of which is looked for everywhere in a text
_BOS = ("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>")
_EOS = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>")
_SPACE_BYTES = [BYTES[byte] for byte in SPACE.encode()]
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE = re.compile(r"(?s).+")


def valid_text(text: str) -> str:
    """`text` with each lone surrogate, which no UTF-8 file can hold, replaced by U+FFFD.

    >>> valid_text("a\\ud800b")
    'a\ufffdb'
    """
    return _SURROGATE.sub("\ufffd", text)


class Tokenizer:
    """A tokenizer, opened: the same ids from tokenizer.json, tokenizer.model and GGUF, and as SentencePiece gives.

    Text is text: a control token spelled out in it is encoded letter by letter, never as the control
    token, unless `special=True` asks for that. No BOS is added. Lone surrogates become U+FFFD; all
    other text comes back exactly from `decode(encode(text))` where the vocabulary has byte pieces. That
    holds for U+2581 too, which SentencePiece itself cannot tell from a space: it goes in as its bytes.
    Symbols that a vocabulary calls user-defined (Gemma's runs of spaces, <table>) are cut out of a text first,
    the longest that begins at a place, as SentencePiece and llama.cpp do and the `tokenizers` library does not.
    """

    def __init__(self, data: bytes | Vocabulary, source: Path, *, chat_template: str | None = None) -> None:
        """Use `open` or `from_vocabulary`. data: the bytes of a tokenizer.json found at `source`, or what it is of."""
        self.source = source
        self.chat_template = chat_template
        self._file = None if isinstance(data, Vocabulary) else data
        self._table = Table.of(data) if isinstance(data, Vocabulary) else _kept(data)
        self._vocabulary = data if isinstance(data, Vocabulary) and self._table is None else None
        self.vocab_size: int = self._fast.get_vocab_size() if self._table is None else len(self._table)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = self._named()
        space = _bytes_of_space(self._fast) if self._table is None else list(map(self._table.find, _SPACE_BYTES))
        self._symbols = self._user_defined() if space else {}
        self._controls = self._special()
        self._rest = whole(self._symbols) if space else _WHOLE
        self._read_our_way = {SPACE: space} if space else {}
        self._read_our_way |= {symbol: [number] for symbol, number in self._symbols.items()}
        self._seen = 0  # characters encoded so far
        self._known: dict[str, list[int]] = {}
        self._cached = 0  # characters in `_known`
        self.forget()

    @cached_property
    def _fast(self) -> tokenizers.Tokenizer:
        """The library's tokenizer: for much text, and for all of a vocabulary that no table holds."""
        data = self._file
        fast = _built(self.vocabulary(), self.source) if data is None else _parsed(data, self.source)
        fast.no_padding()
        fast.no_truncation()
        fast.encode_special_tokens = True  # the library's way to say: as text
        if _bytes_of_space(fast):
            # A file may list as plain symbols what steers a model; the library is told that these are none.
            added = fast.get_added_tokens_decoder().values()
            steering = [token.content for token in added if not token.special and steers(token.content)]
            fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in steering])
        if fast.get_vocab_size() > LARGE:
            give_back_freed_memory()
        return fast

    @staticmethod
    def open(path: str | Path) -> Tokenizer:
        """Open a tokenizer.json, a tokenizer.model (SentencePiece), or the folder that holds one, the first if both.

        Its chat template is read from the files beside it.

        Raises:
            Error: there is none, or it cannot be read or understood.
        """
        path = Path(path)
        file = path
        if path.is_dir():
            file = path / FILES[0]
            if not file.exists() and (path / FILES[1]).exists():
                file = path / FILES[1]
        try:
            if file.stat().st_size > LARGEST:
                raise Error("is too large for a tokenizer", where=file)
            data = file.read_bytes()
        except OSError as error:
            fix = "name a tokenizer.json or a folder with one; `gemstill tokenizer` makes it"
            raise Error(f"no tokenizer can be read here ({error.strerror})", where=file, fix=fix) from error
        template = settings.read_chat_template(file.parent)
        if file.suffix == ".model":
            return Tokenizer(Vocabulary.from_sentencepiece(data, where=file), file, chat_template=template)
        return Tokenizer(data, file, chat_template=template)

    @staticmethod
    def from_vocabulary(
        vocabulary: Vocabulary, *, chat_template: str | None = None, source: str | Path = "vocabulary"
    ) -> Tokenizer:
        """The tokenizer of a vocabulary. source: the file it comes from, for messages. Raises Error as `open` does."""
        return Tokenizer(vocabulary, Path(source), chat_template=chat_template)

    @cached_property
    def data(self) -> bytes:
        """The bytes of its tokenizer.json."""
        return self.vocabulary().to_tokenizer_json() if self._file is None else self._file

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its tokenizer.json, as hexadecimal digits."""
        return hashlib.sha256(self.data).hexdigest()

    def vocabulary(self) -> Vocabulary:
        """Its SentencePiece vocabulary, with the scores of a tokenizer.model beside it, else by the merges' order.

        Raises:
            Error: it gives other ids than any SentencePiece model would.
        """
        if self._vocabulary is None:
            if self._table is not None:
                found = self._table.vocabulary()
            else:
                ids = (self.bos_id, self.eos_id, self.unk_id, self.pad_id)
                found = from_json(json.loads(self._fast.to_str()), ids, where=self.source)
            beside = self._beside(FILES[1])
            if self._file is not None and beside is not None:
                original = Vocabulary.from_sentencepiece(beside.read_bytes(), where=beside)
                if original.pieces == found.pieces and original.merges() == found.merges():  # else another's file
                    found = replace(found, scores=original.scores)
            self._vocabulary = found
        return self._vocabulary

    def save(self, folder: str | Path) -> None:
        """Write its files (`FILES`) to `folder`: those that came beside its own are copied as they are.

        Without them a tokenizer.model is written where SentencePiece can say what the tokenizer does, and settings
        for `transformers` with the chat template. Raises Error when unwritable.
        """
        folder = Path(folder)
        files.write(folder / FILES[0], self.data)
        for name in FILES[1:]:
            beside = self._beside(name)
            if beside is not None and beside.resolve() != (folder / name).resolve():
                with files.writing(folder / name) as temporary:
                    shutil.copyfile(beside, temporary)
        try:
            vocabulary = self.vocabulary()
        except Error:
            return  # nobody's SentencePiece model
        if self._beside(FILES[1]) is None:
            files.write(folder / FILES[1], vocabulary.to_sentencepiece())
        if self._beside(FILES[2]) is None:
            files.write_json(folder / FILES[2], settings.for_transformers(vocabulary, self.chat_template))

    def _beside(self, name: str) -> Path | None:
        """The file of that name where the tokenizer was read from a folder that has it."""
        path = self.source.parent / name
        return path if self.source.suffix in (".json", ".model") and path.is_file() else None

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling in the vocabulary, None when it is not there."""
        if self._table is not None:
            number = self._table.find(token)
            return None if number < 0 else number
        found: int | None = self._fast.token_to_id(token)
        return found

    @cached_property
    def control_ids(self) -> set[int]:
        """The ids of all control tokens, which no text is made of."""
        return set(self._controls.values())

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`, without BOS. special: read control tokens spelled in it as such (templates do)."""
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, several times as fast as one by one."""
        if special:
            return [self._encode_controls(text) for text in texts]
        cut = None
        size = sum(map(len, texts))
        self._seen += size
        if "_cut" in self.__dict__ or size > LITTLE:  # to find it takes as long as to encode a little
            cut = self._cut
        find = (cut or self._rest).findall
        words = [find(text if text.isascii() else valid_text(text)) for text in texts]
        if self._cached > CACHE or cut is None:
            self.forget()
        known = self._known  # ours to the end, should another thread begin a new one
        new = list(set(itertools.chain.from_iterable(words)).difference(known))
        known.update(zip(new, self._merged(new), strict=True))
        self._cached += sum(map(len, new))
        return [list(itertools.chain.from_iterable(map(known.__getitem__, row))) for row in words]

    def forget(self) -> None:
        """Let go of the words whose ids are remembered."""
        self._known, self._cached = self._read_our_way.copy(), 0

    def _merged(self, words: list[str]) -> Iterator[list[int]]:
        """The ids of words without symbols in them."""
        if self._table is not None and "_fast" not in self.__dict__ and self._seen <= PATIENCE:
            return (self._table.merge(word.replace(" ", SPACE)) for word in words)
        if not self._plain_merging:
            return (encoding.ids for encoding in self._fast.encode_batch_fast(words, add_special_tokens=False))
        merge = self._fast.model.tokenize  # of the library's whole way the one step that does anything to a word
        return ([token.id for token in merge(word.replace(" ", SPACE))] for word in words)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of `ids`; special: spell out control tokens, or leave them away. Broken UTF-8 gives U+FFFD."""
        if self._table is not None:
            return self._table.decode(ids, special=special)
        text: str = self._fast.decode(list(ids), skip_special_tokens=not special)
        return text

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({any_of(filter(None, self._controls))})")

    def split_controls(self, text: str) -> list[str | int]:
        """`text` cut at the control tokens spelled in it: texts that may be empty, and between two of them an id."""
        parts = self._control_pattern.split(text)  # text, control token, text, …
        return [self._controls[part] if place % 2 else part for place, part in enumerate(parts)]

    def _encode_controls(self, text: str) -> list[int]:
        parts = self.split_controls(text)
        plain = iter(self.encode_batch([part for part in parts if isinstance(part, str)]))
        return [id for part in parts for id in (next(plain) if isinstance(part, str) else [part])]

    def _named(self) -> tuple[int, int, int, int]:
        """The ids of bos, eos, unk and pad."""
        if self._table is not None:
            return _whole_ids(*self._table.named, where=self.source)
        if (known := self._vocabulary) is not None:
            return _whole_ids(known.bos_id, known.eos_id, known.unk_id, known.pad_id, where=self.source)
        return _usual_ids(self._fast.token_to_id, where=self.source)

    def _special(self) -> dict[str, int]:
        """The control tokens by their spelling."""
        if self._table is not None:
            return self._table.of_type(CONTROL, UNKNOWN)
        added = self._fast.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def _user_defined(self) -> dict[str, int]:
        """What is cut out of a text before merging, as it is typed."""
        if self._table is not None:
            defined = self._table.of_type(USER_DEFINED)
        else:
            added = self._fast.get_added_tokens_decoder().items()
            defined = {token.content: number for number, token in added if not token.special}
            runs = {run: self.token_id(run) for run in whitespace_runs(defined)}
            defined |= {run: number for run, number in runs.items() if number is not None}
        if len(defined) > MOST_SYMBOLS:
            raise Error(f"has {len(defined)} user-defined symbols, {MOST_SYMBOLS} at most are read", where=self.source)
        return {symbol.replace(SPACE, " "): number for symbol, number in defined.items()}

    @cached_property
    def _plain_merging(self) -> bool:
        """Is all that happens to a text that its spaces are spelled U+2581 and its pieces merged?"""
        model, normalizer, pre = self._fast.model, self._fast.normalizer, self._fast.pre_tokenizer
        if not isinstance(model, models.BPE) or model.dropout or model.ignore_merges or not self._read_our_way:
            return False
        if normalizer is None or json.loads(normalizer.__getstate__()) != NORMALIZER:
            return False
        return pre is None or json.loads(pre.__getstate__()).get("pattern") == {"String": " "}

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """The finest way to cut a text that leaves its ids as they are, None where there is none we know."""
        if not self._plain_merging:
            return None
        apart = {*self._controls, *BYTES, *(symbol.replace(" ", SPACE) for symbol in self._symbols)}
        return finest_cut(self._fast.get_vocab(with_added_tokens=True).keys() - apart, self._symbols)


def _bytes_of_space(fast: tokenizers.Tokenizer) -> list[int]:
    """The byte pieces of U+2581, empty where there are none or the character is read as itself."""
    found = [fast.token_to_id(piece) for piece in _SPACE_BYTES]
    ids = [number for number in found if number is not None]
    plain = fast.encode(SPACE, add_special_tokens=False).ids
    return [] if len(ids) < len(found) or fast.decode(plain) == SPACE else ids


def _whole_ids(bos: int, eos: int, unk: int, pad: int, *, where: object) -> tuple[int, int, int, int]:
    """The same, with others in place of an unknown or padding token that is not there (-1)."""
    if bos < 0 or eos < 0:
        fix = "use a tokenizer that has them"
        raise Error("the vocabulary has no control tokens for beginning and end", where=where, fix=fix)
    pad = eos if pad < 0 else pad
    return bos, eos, pad if unk < 0 else unk, pad


def _usual_ids(find: Callable[[str], int | None], *, where: object) -> tuple[int, int, int, int]:
    """The ids of bos, eos, unk and pad of a tokenizer.json, which does not say: by the spellings that people use."""

    def first(*names: str) -> int:
        found = [number for number in map(find, names) if number is not None]
        return found[0] if found else -1

    for names in (_BOS, _EOS):
        if first(*names) < 0:
            what = f"the vocabulary has none of the control tokens {', '.join(names)}"
            raise Error(what, where=where, fix="use a tokenizer that has one")
    return _whole_ids(first(*_BOS), first(*_EOS), first("<unk>"), first("<pad>", "<unk>"), where=where)


def _kept(data: bytes) -> Table | None:
    """The table of a tokenizer.json that takes the library long to read and does what SentencePiece does, else None.

    It is kept on disk by what it was made of: to make it takes as long.
    """
    if len(data) < LARGE_FILE:
        return None
    key = hashlib.sha256(f"{VERSION}|{hashlib.sha256(data).hexdigest()}".encode()).hexdigest()
    place = files.cached(f"tokenizer-{key[:32]}")
    with suppress(OSError):
        if place.stat().st_size <= LARGEST and (table := Table.from_bytes(place.read_bytes())) is not None:
            return table
    if (state := plain_state(data)) is None:
        return None
    try:
        numbers = state["model"]["vocab"]
        vocabulary = from_json(state, _usual_ids(numbers.get, where=""), where="")
    except Error:
        return None  # no SentencePiece model
    table = Table.of(vocabulary)
    if table is not None:
        with suppress(Error):  # no place to keep it: it is made again next time
            files.write(place, table.to_bytes())
    del state, numbers, vocabulary
    give_back_freed_memory()
    return table


def _parsed(data: bytes, source: Path) -> tokenizers.Tokenizer:
    check_file(data, source)
    try:
        fast = tokenizers.Tokenizer.from_str(data.decode())
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics that are not even that
        raise Error(f"is not a tokenizer.json ({error})", where=source) from error
    check_parts(fast, source)
    return fast


def _built(vocabulary: Vocabulary, source: Path) -> tokenizers.Tokenizer:
    try:
        return vocabulary.fast()
    except Exception as error:  # as above
        raise Error(f"holds no vocabulary that can be used ({error})", where=source) from error
