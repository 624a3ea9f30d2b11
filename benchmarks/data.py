"""How fast does text become shards, and how fast do shards become batches?

Shards: `write_dataset` over Python's own library, all of it (reading, splitting, encoding, writing,
fsync), against `tokenizers`' encode_batch on the same texts already in memory, with all cores each.
Loader: tokens a second of packed batches on one core, against none.
"""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import tokenizers

from common import alternate, arguments, compare, finish
from gemstill.data.loader import Loader
from gemstill.data.shards import write_dataset
from gemstill.data.sources import Source, read_source
from gemstill.text.training import train_tokenizer

LIBRARY = Source(
    Path(sysconfig.get_path("stdlib")),
    pattern="**/*.py",
    exclude=["test", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages"],
    name="python-library",
)
VOCABULARY, WINDOW, WINDOWS, STEPS = 4096, 256, 8, 400


def main() -> None:
    args = arguments(__doc__, rounds=5)
    rounds = 2 * args.rounds if args.full else args.rounds
    texts = [document.text for document in read_source(LIBRARY)]
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        start = time.perf_counter()
        tokenizer = train_tokenizer(texts, place / "tokenizer", VOCABULARY)
        print(
            f"tokenizer of {VOCABULARY} entries trained on {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s"
        )
        peer = tokenizers.Tokenizer.from_file(str(place / "tokenizer" / "tokenizer.json"))

        def shards() -> float:
            shutil.rmtree(place / "data", ignore_errors=True)
            start = time.perf_counter()
            write_dataset(LIBRARY, tokenizer, place / "data", shard_bytes=2 << 20)
            return size / (time.perf_counter() - start) / 1e6

        def encode_batch() -> float:
            start = time.perf_counter()
            for encoding in peer.encode_batch(texts, add_special_tokens=False):
                _ = encoding.ids  # what is wanted of it, copied out
            return size / (time.perf_counter() - start) / 1e6

        found = alternate({"shards": shards, "encode_batch": encode_batch}, rounds=rounds)
        name = f"text to shards, against tokenizers {tokenizers.__version__} encode_batch alone"
        rows = [compare(name, found["shards"], found["encode_batch"], "MB/s", bar=0.9)]

        dataset = write_dataset(LIBRARY, tokenizer, place / "data", shard_bytes=2 << 20).train
        loader = Loader([(dataset, 1.0)], WINDOW, WINDOWS, seed=0)

        def batches() -> float:
            start = time.perf_counter()
            for step in range(STEPS):
                loader.batch(step)
            return STEPS * loader.tokens_per_step / (time.perf_counter() - start)

        rate = alternate({"batches": batches}, rounds=rounds)["batches"]
        rows.append(compare(f"loader, {WINDOWS} windows of {WINDOW}", rate, None, "tokens/s"))
        finish(rows)


if __name__ == "__main__":
    main()
