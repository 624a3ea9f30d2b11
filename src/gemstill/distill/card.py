"""The card of a probability store, so that the folder is a Hub data set as it is."""

from __future__ import annotations

from gemstill.distill.store import StoreInfo

BIASED = "It is biased: what is outside the k largest is missing, and the k are scaled up to one."
UNBIASED = "It is unbiased: the mean over draws is the teacher's distribution, for every loss linear in it."


def store_card(info: StoreInfo) -> str:
    """README.md with the Hub's header: what the store is made of, how to read it, what follows from the licence."""
    licence = info.teacher_licence
    return f"""---
license: {licence if licence != "unknown" else "other"}
pretty_name: Next-token distributions of {info.teacher}
tags: [distillation, logits, gemstill]
---
# Next-token distributions of {info.teacher}

What the language model **{info.teacher}** (licence: {licence}) expects as the next token at each of
{info.num_tokens:,} tokens, a few entries of its distribution each, to distil students from. What its licence says of
models trained on its outputs holds for this data and for such students.

| | |
| --- | --- |
| estimator | {info.estimator}. {BIASED if info.estimator.startswith("topk") else UNBIASED} |
| temperature | {info.temperature:g} |
| window | {info.window} tokens; the teacher saw a token's document from the beginning of its window on |
| vocabulary | {info.vocab_size:,} entries ({info.stored_vocab_size:,} rows in the teacher's head) |
| teacher | SHA-256 {info.teacher_fingerprint} |
| tokenizer | SHA-256 {info.tokenizer_fingerprint} |
| token shards | SHA-256 {info.dataset_fingerprint} |
| computed in | {info.precision}, seed {info.seed} |

Row i is about token i + 1 of the shards. `store.json` lists the files with their SHA-256. With gemstill:

```python
store = gemstill.Store.open("this folder", dataset)   # refuses other shards
target = store[a:b]                                   # ids, probs [rows, entries], weight [rows]
loss = gemstill.linear_cross_entropy(hidden, head, target)
```

Without it: the format is described, with a reader in thirty lines of NumPy, in gemstill's docs/formats.md. A weight is
a whole number of 1/{info.units}.
"""
