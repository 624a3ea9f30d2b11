"""Which estimator keeps most of a teacher in a byte, and what do writing and reading a store cost?

Variance: E Σ_v (q̂_v − p_v)² of what is read back, rounding and all: the noise that a store adds to the
gradient of the logits. Bytes: the whole folder over its tokens, one id code for all. Variances at 24, 32 and
48 bytes are log-linear between the two nearest parameters. Figures stand for all rows and for the thirds of
low, middle and high entropy. Calibration: the mass that a target gives to entries of p ≥ 0.1, of 0.01 to 0.1
and below, over what the teacher gives them. `--model` wants a large vocabulary: Gemma 3 270M, any form of it.
"""

from __future__ import annotations

import math
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import Row, alternate, arguments, compare, finish
from gemstill.checkpoint.source import load
from gemstill.core import files
from gemstill.core.machine import fast_dtype
from gemstill.data.sources import Source, read_source
from gemstill.distill import code
from gemstill.distill.block import block_path, decode, encode, write_block
from gemstill.distill.card import store_card
from gemstill.distill.estimators import Estimator
from gemstill.distill.store import Store, StoreInfo, write_index
from gemstill.distill.teach import describe, teach_model
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.ops.loss import linear_cross_entropy
from gemstill.train.config import OptimizerConfig
from gemstill.train.optimizer import Optimizer

WINDOW, WINDOWS, CHUNK, TIMED = 256, 12, 128, 1024
GRID = {
    "threshold": [0.14, 0.1, 0.07, 0.05, 0.04, 0.033, 0.027, 0.022, 0.018, 0.015, 0.012, 0.009],
    "sample": [6, 9, 12, 16, 24, 32, 44, 60, 80, 110, 140],
    "topk": [3, 5, 8, 12, 18, 26, 38],
}
BARS = {24: 0.48, 32: 0.42, 48: 0.38}
EDGES = (0.0, 0.01, 0.1)


class Stream:
    """Tokens in memory as a data set, one document, its first token bos."""

    tokenizer_fingerprint, fingerprint = "a" * 64, "b" * 64

    def __init__(self, tokens: np.ndarray[Any, Any], vocab_size: int) -> None:
        self.tokens, self.vocab_size, self.num_tokens = tokens, vocab_size, len(tokens)
        self.document_starts, self.bos_id = np.array([0]), int(tokens[0])

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        return self.tokens[start:stop]


class Tally:
    """What becomes of one estimator, over rows that come a few at a time."""

    def __init__(self, estimator: Estimator, info: StoreInfo) -> None:
        self.estimator, self.info, self.parts = estimator, info, []
        self.noise: list[Tensor] = []
        self.missing: list[Tensor] = []
        self.mass = torch.zeros(len(EDGES), dtype=torch.float64)

    def add(self, raw: Tensor, p: Tensor, square: Tensor, softcap: float | None) -> None:
        """Estimate rows of logits `raw`, whose distributions are p and Σp² is `square`."""
        u = torch.rand(len(p), self.estimator.uniforms + 1, dtype=torch.float64)
        rows = encode(self.estimator.of_logits(raw.clone(), u, softcap), self.info, u[:, -1])
        ids, q = (torch.from_numpy(part) for part in decode([rows], self.info.units))
        there = p.gather(1, ids) * (q > 0)
        self.noise.append((q.double() - there.double()).square().sum(1) + square - there.double().square().sum(1))
        self.missing.append(1 - there.sum(1))
        self.mass += _by_size(there, q)
        self.parts.append(rows)

    def bytes_per_token(self, tokens: np.ndarray[Any, Any]) -> float:
        """Write the store: the block over its rows, and the other files over the tokens that ids are ranked by,
        as in a store of all that text."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            code.write(folder, code.IdCode.of(Stream(tokens, self.info.vocab_size), self.estimator.entries))
            write_index(folder, self.info, None)
            write_block(folder, self.info, 0, self.parts)
            files.write(folder / "README.md", store_card(self.info))
            write_index(folder, self.info, [files.sha256(block_path(folder, 0))])
            block, rows = block_path(folder, 0).stat().st_size, self.info.num_tokens
            return block / rows + (Store.open(folder).bytes_per_token * rows - block) / len(tokens)


def _by_size(p: Tensor, q: Tensor) -> Tensor:
    """The sum of q over entries of each size of p."""
    size = torch.bucketize(p, torch.tensor(EDGES[1:], dtype=p.dtype), right=True)
    return torch.stack([torch.where(size == index, q, 0).sum(dtype=torch.float64) for index in range(len(EDGES))])


def measure(model: Transformer, stream: Stream, known: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """The figures of every estimator of GRID on the stream's rows; `known` is the text that the id code is made of."""
    info = describe(model, stream, window=WINDOW, block_tokens=len(stream.tokens), batch=4)
    chosen = [Estimator(name, parameter) for name, parameters in GRID.items() for parameter in parameters]
    tallies = [Tally(estimator, replace(info, estimator=str(estimator))) for estimator in chosen]
    entropy, mass = [], torch.zeros(len(EDGES), dtype=torch.float64)
    head, cap = model.embed_tokens.weight.detach(), model.config.final_logit_softcap
    with torch.inference_mode():
        hidden = model(torch.from_numpy(stream.tokens).view(-1, WINDOW), readout=lambda h, head, cap: h).flatten(0, 1)
        for x in torch.split(hidden, CHUNK):
            raw = F.linear(x, head.to(x.dtype))
            z = raw.float() if cap is None else cap * torch.tanh(raw.float() / cap)
            p = z.softmax(1)
            entropy.append(-(p * p.clamp(min=1e-30).log()).sum(1))
            mass += _by_size(p, p)
            square = p.double().square().sum(1)
            for tally in tallies:
                tally.add(raw, p, square, cap)
    order = torch.cat(entropy).argsort()
    return [_figures(tally, known, order, mass) for tally in tallies]


def _figures(tally: Tally, known: np.ndarray[Any, Any], order: Tensor, mass: Tensor) -> dict[str, Any]:
    noise, missing = torch.cat(tally.noise), torch.cat(tally.missing)
    thirds = torch.tensor_split(order, 3)
    counts = np.concatenate([part.counts for part in tally.parts])
    return {
        "estimator": str(tally.estimator),
        "name": tally.estimator.name,
        "bytes": tally.bytes_per_token(known),
        "entries": float(counts.mean()),
        "variance": float(noise.mean()),
        "variance_by_entropy": [float(noise[third].mean()) for third in thirds],
        "entries_by_entropy": [float(counts[third.numpy()].mean()) for third in thirds],
        "bias": float(missing.mean()) if tally.estimator.name == "topk" else 0.0,
        "bias_by_entropy": [
            float(missing[third].mean()) if tally.estimator.name == "topk" else 0.0 for third in thirds
        ],
        "calibration": (tally.mass / mass).tolist(),
    }


def at(points: list[dict[str, Any]], name: str, size: float) -> float:
    """The variance of an estimator at so many bytes a token."""
    mine = sorted((point["bytes"], point["variance"]) for point in points if point["name"] == name)
    x, y = np.log(mine).T
    if not x[0] <= math.log(size) <= x[-1]:
        raise SystemExit(f"{name} was measured from {mine[0][0]:.1f} to {mine[-1][0]:.1f} bytes alone")
    return float(np.exp(np.interp(math.log(size), x, y)))


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """The picture: variance against bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gemstill"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, mark in (("sample", "s"), ("topk", "^"), ("threshold", "o")):
        mine = [point for point in points if point["name"] == name]
        size, noise = [point["bytes"] for point in mine], [point["variance"] for point in mine]
        axes.loglog(size, noise, marker=mark, label=name if name != "topk" else "topk (bias squared)")
    axes.set_xlabel("bytes a token")
    axes.set_ylabel("Σ E (q̂ − p)²")
    ticks = [5, 8, 12, 16, 24, 32, 48]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def teaching(model: Transformer, stream: Stream, rounds: int) -> Row:
    """Tokens a second of `teach`, file and all, against the forward pass and the head's products alone."""
    tokens = torch.from_numpy(stream.tokens[:TIMED]).view(-1, WINDOW)
    few = Stream(stream.tokens[:TIMED], stream.vocab_size)
    info = describe(model, few, window=WINDOW, block_tokens=TIMED, batch=len(tokens))

    def products(hidden: Tensor, head: Tensor, softcap: float | None) -> None:
        for x in torch.split(hidden.flatten(0, 1), CHUNK):
            F.linear(x, head.to(x.dtype))

    def bare() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(tokens, readout=products)
        return TIMED / (time.perf_counter() - start)

    def teach() -> float:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            teach_model(model, few, folder, info)
            return TIMED / (time.perf_counter() - start)

    found = alternate({"teach": teach, "bare": bare}, rounds=rounds)
    name = f"teach, threshold(0.05), V = {stream.vocab_size:,}, against the forward pass and the head's products"
    return compare(name, found["teach"], found["bare"], "tokens/s", bar=0.9)


def reading(model: Transformer, stream: Stream, rounds: int) -> Row:
    """Rows a second of a store at random windows, against what training takes; both on one thread."""
    torch.set_num_threads(1)
    student = Transformer(ModelConfig.preset("mini-15m"))
    student.compute_dtype = fast_dtype()
    optimizer = Optimizer(student.named_parameters(), OptimizerConfig())
    with tempfile.TemporaryDirectory() as folder:
        info = describe(model, stream, window=WINDOW, block_tokens=len(stream.tokens), batch=4)
        store = teach_model(model, stream, folder, info)
        starts = torch.randint(0, len(store) // WINDOW, (64, 4), generator=torch.Generator().manual_seed(0)) * WINDOW
        small = store[: 4 * WINDOW]
        target = small._replace(ids=small.ids % student.config.vocab_size)

        def train() -> float:
            start = time.perf_counter()
            tokens = torch.randint(0, student.config.vocab_size, (4, WINDOW))
            loss = student(
                tokens, readout=lambda h, head, cap: linear_cross_entropy(h.flatten(0, 1), head, target, softcap=cap)
            )
            loss.backward()
            optimizer.step(1e-6)
            return tokens.numel() / (time.perf_counter() - start)

        def read() -> float:
            start = time.perf_counter()
            for windows in starts:
                store.target(windows, WINDOW)
            return starts.numel() * WINDOW / (time.perf_counter() - start)

        found = alternate({"read": read, "train": train}, rounds=rounds)
    name = "reading a store of threshold(0.05) at random windows, one thread, against training mini-15m on one"
    return compare(name, found["read"], found["train"], "tokens/s", bar=20.0)


def main() -> None:
    args = arguments(
        __doc__, model="google/gemma-3-270m", text=sysconfig.get_path("stdlib"), pattern="**/*", picture="", rounds=3
    )
    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    model.compute_dtype = fast_dtype()
    source = Source(Path(args.text), pattern=args.pattern)
    texts = [document.text[2000:202_000] for document in read_source(source)][:: 1 if args.full else 4]
    encoded = [np.array(tokenizer.encode(text), np.int64) for text in texts]
    windows = (2 if args.full else 1) * WINDOWS
    begin = [tokenizer.bos_id]  # of every window, as training and teaching have it
    places = [(tokens, at) for at in (1000, 20_000) for tokens in encoded if len(tokens) > at + WINDOW]
    chosen = [np.append(begin, tokens[at + 1 : at + WINDOW]) for tokens, at in places]
    stream = Stream(np.concatenate(chosen[:windows]), tokenizer.vocab_size)
    known = np.concatenate(encoded)
    print(f"{len(stream.tokens)} rows; ids ranked by {len(known):,} tokens of the same books", flush=True)
    points = measure(model, stream, known)
    for point in points:
        thirds = " ".join(f"{value:.4f}" for value in point["variance_by_entropy"])
        bias = " ".join(f"{value:.3f}" for value in (point["bias"], *point["bias_by_entropy"]))
        sizes = " ".join(f"{value:.2f}" for value in point["calibration"])
        print(
            f"{point['estimator']:17} {point['bytes']:5.1f} B {point['entries']:5.1f} entries  "
            f"variance {point['variance']:.4f} ({thirds})  bias {bias}  calibration {sizes}"
        )
    if args.picture:
        draw(points, Path(args.picture))
    rows = [
        compare(
            f"variance of threshold against sample, at {size} bytes", [at(points, "threshold", size)],
            [at(points, "sample", size)], "Σ Var", bar=bar, small=True,
        )
        for size, bar in BARS.items()
    ]  # fmt: skip
    rows += [teaching(model, stream, args.rounds), reading(model, stream, args.rounds)]
    finish(rows, points=points)


if __name__ == "__main__":
    main()
