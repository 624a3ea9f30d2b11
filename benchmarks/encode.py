"""How fast does text become ids, against the `tokenizers` library's own encode_batch on the same texts?

Code and prose of Python's own library, in batches as a data set is made of them. Each round of ours begins with
nothing remembered. With GEMSTILL_GEMMA_TOKENIZER naming the published tokenizer.json that is measured, else a small
one trained here. The library uses all cores, ours one.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
import time
from pathlib import Path

import tokenizers

from common import alternate, arguments, compare, finish
from gemstill.data.sources import Source, read_source
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = ["test", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages"]
CODE = Source(LIBRARY, pattern="**/*.py", exclude=LEFT_OUT)
PROSE = LIBRARY / "pydoc_data" / "topics.py"
VARIABLE, VOCABULARY = "GEMSTILL_GEMMA_TOKENIZER", 4096


def main() -> None:
    args = arguments(__doc__, rounds=5)
    rounds = 2 * args.rounds if args.full else args.rounds
    texts = {
        "code": [document.text for document in read_source(CODE)],
        "prose": PROSE.read_text(encoding="utf-8").split("\n\\n"),
    }
    with tempfile.TemporaryDirectory() as folder:
        named = os.environ.get(VARIABLE)
        file = Path(named or Path(folder) / "tokenizer" / "tokenizer.json")
        if not named:
            train_tokenizer(texts["code"], file.parent, VOCABULARY)
        peer, ours = tokenizers.Tokenizer.from_file(str(file)), Tokenizer.open(file)
        ours.encode("a " * 100_000)  # finds out, once, how texts may be cut
        entries = f"{ours.vocab_size:,} entries"
        rows = []
        for kind, batch in texts.items():
            size = sum(len(text.encode()) for text in batch)

            def mine(batch: list[str] = batch, size: int = size) -> float:
                ours.forget()
                start = time.perf_counter()
                ours.encode_batch(batch)
                return size / (time.perf_counter() - start) / 1e6

            def theirs(batch: list[str] = batch, size: int = size) -> float:
                start = time.perf_counter()
                for encoding in peer.encode_batch(batch, add_special_tokens=False):
                    _ = encoding.ids  # what is wanted of it, copied out
                return size / (time.perf_counter() - start) / 1e6

            found = alternate({"ours": mine, "encode_batch": theirs}, rounds=rounds)
            name = f"{kind}, {entries}, against tokenizers {tokenizers.__version__} encode_batch"
            rows.append(compare(name, found["ours"], found["encode_batch"], "MB/s", bar=0.95))
        finish(rows)


if __name__ == "__main__":
    main()
