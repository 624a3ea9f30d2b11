"""The same student trained twice, its loss's backward pass exact and by drawn columns: held-out perplexity at the end.

python benchmarks/sampled_training.py --tokenizer PLACE --text FOLDER: a tokenizer's folder or a GGUF file's gives the
vocabulary, the folder's .txt and .txt.gz files the text, of which every tenth window is held out. Both runs see the
same windows from the same initial weights. The bar: perplexities within 0.2 %.
"""

from __future__ import annotations

import gzip
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemstill
from common import arguments, compare, finish
from gemstill.core.machine import fast_dtype
from gemstill.model.config import ModelConfig
from gemstill.model.readout import LogProbs, Loss
from gemstill.model.transformer import Transformer
from gemstill.ops.target import Target
from gemstill.text.tokenizer import Tokenizer

WINDOW = 256


def windows(tokenizer: Tokenizer, folder: str, count: int) -> Tensor:
    """[count, WINDOW + 1] int64, an equal share of every file."""
    files = sorted([*Path(folder).glob("*.txt"), *Path(folder).glob("*.txt.gz")])
    each, rows = -(-count // len(files)), []
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
            ids = tokenizer.encode(stream.read(8 * each * (WINDOW + 1)))  # a token is some four letters
        rows += [ids[n * (WINDOW + 1) : (n + 1) * (WINDOW + 1)] for n in range(each)]
    whole = torch.tensor([row for row in rows if len(row) == WINDOW + 1])
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))][:count]


def train(config: ModelConfig, text: Tensor, heldout: Tensor, batch: int, rate: float, backward: Any) -> dict[str, Any]:
    model = Transformer(config, compute_dtype=fast_dtype("cpu"), seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    steps, start = len(text) // batch, time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = text[step * batch : (step + 1) * batch]
        target = Target.hard(rows[:, 1:])
        loss = model(rows[:, :-1], readout=Loss(target, backward=backward, seed=1000 * step)) / rows[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"{backward} {step + 1}/{steps}: {loss.item():.4f} nats", flush=True)
    spent = time.process_time() - start
    with torch.no_grad():
        parts = [model(rows[:, :-1], readout=LogProbs(rows[:, 1:])).double().mean() for rows in heldout.split(batch)]
    return {"perplexity": math.exp(-float(torch.stack(parts).mean())), "seconds": spent}


def main() -> None:
    args = arguments(__doc__, tokenizer="", text="", preset="mini-1m", windows=640, batch=4, rate=0.003)
    place = args.tokenizer
    tokenizer = gemstill.load(place)[1] if place.endswith(".gguf") else Tokenizer.open(place)
    text = windows(tokenizer, args.text, args.windows)
    held = torch.arange(len(text)) % 10 == 9
    config = ModelConfig.preset(args.preset).with_vocab(tokenizer.vocab_size)
    found = {
        how: train(
            config, text[~held], text[held][: len(text[held]) // args.batch * args.batch], args.batch, args.rate, how
        )
        for how in ("exact", "sampled")
    }
    exact, drawn = found["exact"], found["sampled"]
    further = abs(drawn["perplexity"] / exact["perplexity"] - 1)
    rows = [
        compare("held-out perplexity, sampled / exact", [drawn["perplexity"]], [exact["perplexity"]], "perplexity"),
        compare("their relative distance", [further], [0.002], "", bar=1.0, small=True),
        compare("processor time of training", [drawn["seconds"]], [exact["seconds"]], "s"),
    ]
    finish(rows, preset=args.preset, vocab=tokenizer.vocab_size, tokens=int((~held).sum()) * WINDOW)


if __name__ == "__main__":
    main()
