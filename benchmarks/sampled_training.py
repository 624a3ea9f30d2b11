"""The same student trained twice, its loss's backward pass exact and by drawn columns: held-out perplexity at the end.

python benchmarks/sampled_training.py --tokenizer PLACE --text FOLDER trains a preset from scratch, PLACE a tokenizer's
folder or a GGUF file; --start MODEL in place of --tokenizer trains a model on from its own weights. The text is the
folder's .txt and .txt.gz files, of which every tenth window is held out; a window begins with bos. Both runs of a seed
see the same windows in the same order from the same weights. The bar: perplexities within 0.2 %, as geometric means.
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
    """[count, WINDOW + 1] int64, bos in front, an equal share of every file."""
    files = sorted([*Path(folder).glob("*.txt"), *Path(folder).glob("*.txt.gz")])
    each, rows = -(-count // len(files)), []
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
            ids = tokenizer.encode(stream.read(8 * each * WINDOW))  # a token is some four letters
        rows += [[tokenizer.bos_id, *ids[n * WINDOW : (n + 1) * WINDOW]] for n in range(each)]
    whole = torch.tensor([row for row in rows if len(row) == WINDOW + 1])
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))][:count]


def train(model: Transformer, text: Tensor, batch: int, rate: float, backward: Any, seed: int) -> float:
    """Train on all of the text once, in an order of the seed. Returns the seconds of processor time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))]
    steps, start = len(text) // batch, time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = text[step * batch : (step + 1) * batch]
        target = Target.hard(rows[:, 1:])
        loss = model(rows[:, :-1], readout=Loss(target, backward=backward, seed=1000 * step + seed))
        loss = loss / rows[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"{backward} {step + 1}/{steps}: {loss.item():.4f} nats", flush=True)
    return time.process_time() - start


@torch.no_grad()
def perplexity(model: Transformer, heldout: Tensor, batch: int) -> float:
    parts = [model(rows[:, :-1], readout=LogProbs(rows[:, 1:])).double().mean() for rows in heldout.split(batch)]
    return math.exp(-float(torch.stack(parts).mean()))


def main() -> None:
    args = arguments(
        __doc__, start="", tokenizer="", text="", preset="mini-1m", windows=640, batch=4, rate=0.003, seeds=1
    )
    if args.start or args.tokenizer.endswith(".gguf"):
        tokenizer = gemstill.load(args.start or args.tokenizer)[1]
    else:
        tokenizer = Tokenizer.open(args.tokenizer)

    def student(seed: int) -> Transformer:
        if args.start:
            model = gemstill.load(args.start, dtype=torch.float32)[0].train()
            model.compute_dtype = fast_dtype("cpu")
            return model
        config = ModelConfig.preset(args.preset).with_vocab(tokenizer.vocab_size)
        return Transformer(config, compute_dtype=fast_dtype("cpu"), seed=seed).train()

    text = windows(tokenizer, args.text, args.windows)
    held = torch.arange(len(text)) % 10 == 9
    heldout = text[held][: len(text[held]) // args.batch * args.batch]
    found: dict[str, list[float]] = {"exact": [], "sampled": []}
    spent: dict[str, list[float]] = {"exact": [], "sampled": []}
    for seed in range(args.seeds):
        for how in found:
            model = student(seed)
            spent[how].append(train(model, text[~held], args.batch, args.rate, how, seed))
            found[how].append(perplexity(model, heldout, args.batch))
            print(f"seed {seed}, {how}: perplexity {found[how][-1]:.4f}", flush=True)
    logs = [math.log(a / b) for a, b in zip(found["sampled"], found["exact"], strict=True)]
    further = abs(math.expm1(sum(logs) / len(logs)))
    rows = [
        compare("held-out perplexity, sampled / exact", found["sampled"], found["exact"], "perplexity"),
        compare("their relative distance", [further], [0.002], "", bar=1.0, small=True),
        compare("processor time of training", spent["sampled"], spent["exact"], "s"),
    ]
    start = args.start or args.preset
    finish(rows, start=start, vocab=tokenizer.vocab_size, tokens=int((~held).sum()) * WINDOW, seeds=args.seeds)


if __name__ == "__main__":
    main()
