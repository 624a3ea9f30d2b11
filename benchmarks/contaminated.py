"""How fast documents are found that overlap benchmarks' items, beside lm-eval's own Janitor?

Text: the sources of Python's standard library, over and over, 40 MB (100 MB with --full), as shards. Items: 20,000 of
60 words drawn from the words of the text, of which 20 are planted in it. Ours reads shards, decodes, and looks for 13
words and 50 characters; the peer, in Python as lm-eval installs it, gets 1 MB of text and looks for 13 words alone.
The bar of ours is 100 MB of text a minute.
"""

from __future__ import annotations

import contextlib
import io
import random
import sysconfig
import tempfile
import time
from pathlib import Path

from common import arguments, compare, finish
from gemstill.data.shards import write_dataset
from gemstill.data.sources import Source, read_source
from gemstill.evaluation.contaminated import overlaps
from gemstill.evaluation.ngrams import Index
from gemstill.text.training import train_tokenizer

ITEMS, PLANTED, WORDS = 20_000, 20, 60
PEER_BYTES = 1_000_000
MINUTE = 60.0


def main() -> None:
    flags = arguments(__doc__)
    size = (100 if flags.full else 40) * 1_000_000
    rng = random.Random(0)
    library = Source(
        Path(sysconfig.get_paths()["stdlib"]), pattern="**/*.py", exclude=["test", "tests", "site-packages"]
    )
    texts = [document.text for document in read_source(library)]
    words = sorted({word for text in texts[:300] for word in text.split() if word.isalpha()})
    items = [" ".join(rng.choices(words, k=WORDS)) for _ in range(ITEMS)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = train_tokenizer(texts[:300], folder / "tokenizer", 4096)
        total = number = 0
        (folder / "text").mkdir()
        while total < size:
            text = rng.choice(texts)
            if number < PLANTED:
                text += "\n" + items[number]
            (folder / "text" / f"{number:06}.txt").write_text(text)
            total, number = total + len(text.encode()), number + 1
        dataset = write_dataset(folder / "text", tokenizer, folder / "data", heldout_fraction=0).train
        start = time.perf_counter()
        index = Index([[item] for item in items], [0] * ITEMS)
        print(f"index of {ITEMS:,} items: {time.perf_counter() - start:.1f} s")
        rates = []
        for _ in range(2):
            start = time.perf_counter()
            found = overlaps(dataset, tokenizer, index)
            rates.append(dataset.bytes / 1e6 * MINUTE / (time.perf_counter() - start))
            assert {one.item for one in found} == set(range(PLANTED)), "a planted item was missed"
    rows = [
        compare("shards, 13 words and 50 characters; bar: 100 MB/min", rates, [100.0] * len(rates), "MB/min", bar=1.0),
        compare(
            "the same; lm-eval's Janitor in Python, 13 words", rates, [_janitor(items, texts)] * len(rates), "MB/min"
        ),
    ]
    finish(rows)


def _janitor(items: list[str], texts: list[str]) -> float:
    """MB a minute of lm-eval's Janitor over PEER_BYTES of the text."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from lm_eval.decontamination.janitor import Janitor
    janitor = Janitor()
    for item in items:
        janitor.register_contaminant_python(item)
    done, start = 0, time.perf_counter()
    for text in texts:
        janitor.clean_python(text)
        done += len(text.encode())
        if done >= PEER_BYTES:
            break
    return done / 1e6 * MINUTE / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
