"""Long documents cut into passages, and an even sample of them: little text that is still of everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.data.shards import is_heldout
from gemstill.data.sources import Source, read_source

CHARACTERS = 4.6  # of prose for each token wanted; a little more than there are with a large vocabulary
WINDOWS = 4  # that a passage has
SHORTEST = 200  # characters: what is left of a document at its end and shorter is left out


def write_passages(
    source: Source, folder: Path, *, window: int, train: int, heldout: int, heldout_fraction: float
) -> dict[str, int]:
    """Write `folder`/train.jsonl and heldout.jsonl, passages for about so many tokens each; gives their counts.

    Documents are held out whole, by the hash of their text, and cut at paragraphs into passages of about WINDOWS
    windows of `window` tokens. Of all passages of a split, in order, the sample takes every so-manieth.

    Raises:
        Error: the source cannot be read, has too little text, or none of its documents are held out.
    """
    passages: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
    for document in read_source(source):
        held = is_heldout(hashlib.sha256(document.text.encode()).digest(), heldout_fraction)
        parts = passages["heldout" if held else "train"]
        pieces = cut(document.text, int(CHARACTERS * WINDOWS * window))
        parts += [(f"{document.id}#{number}", part) for number, part in enumerate(pieces)]
    counts = {}
    for split, tokens in (("train", train), ("heldout", heldout)):
        found, wanted = passages[split], int(CHARACTERS * tokens)
        total = sum(len(text) for _, text in found)
        if total < wanted:
            what = f"has {total:,} characters of {split} text in passages, {wanted:,} are needed"
            fix = "name more text, or lower tokens" if split == "train" else "raise heldout_fraction"
            raise Error(what, where=source.path, fix=fix)
        number = max(1, min(len(found), round(len(found) * wanted / total)))
        taken = [found[i * len(found) // number] for i in range(number)]
        lines = (json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in taken)
        files.write(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        counts[split] = number
    return counts


def cut(text: str, length: int) -> Iterator[str]:
    """A text's passages: whole paragraphs, until `length` characters are reached; a longer paragraph stays whole."""
    passage: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if not paragraph.strip():
            continue
        passage.append(paragraph.strip("\n"))
        size += len(paragraph) + 2
        if size >= length:
            yield "\n\n".join(passage)
            passage, size = [], 0
    if size >= SHORTEST:
        yield "\n\n".join(passage)
