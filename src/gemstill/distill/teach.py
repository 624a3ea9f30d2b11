"""`gemstill teach`: run a teacher once over a data set and keep its distributions in a probability store."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gemstill.core import files, machine
from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.dataset import TokenDataset
from gemstill.data.rows import entries_used
from gemstill.distill import code
from gemstill.distill.block import Rows, block_path, encode, write_block
from gemstill.distill.card import store_card
from gemstill.distill.claims import Claims
from gemstill.distill.estimators import Draw, Estimator
from gemstill.distill.store import INDEX, Shards, Store, StoreInfo, write_index
from gemstill.distill.teachers import SERVERS, ModelTeacher, Teacher, as_teacher, open_teacher, tempered
from gemstill.ops.target import OnlineTarget, Target
from gemstill.text.tokenizer import Tokenizer

# Held at once: so many logits, but no fewer rows than make reading a large head worth while. Fixed, since the
# shapes of products decide their last bits.
LOGITS, ROWS = 1 << 22, 128
PAUSE = 0.2  # seconds between two looks at what others are doing
BITS_AN_ENTRY = 14  # with its weight, if it has one, and its share of what a row takes; measured in docs/distill.md


@dataclass(frozen=True)
class TeachConfig:
    """A teacher over a data set into a store."""

    teacher: str  # a model: a folder, a .gguf file, a name on the hub, or a server, http://host:8000/v1#its-model
    data: Path  # a data set's folder of shards, for example data/train
    output: Path  # the store's folder; a store begun there with the same settings is continued
    estimator: Estimator = field(default_factory=Estimator)  # what is kept of a distribution
    window: int = 256  # tokens the teacher sees at once; students must train with the same
    block_tokens: int = 65_536  # tokens of one file, a multiple of window: what is lost at most when interrupted
    batch: int = 16  # windows at once; memory grows with it
    temperature: float = 1.0  # logits are divided by it
    seed: int = 0  # of the draws
    precision: str = "fast"  # dtype of the teacher's products: fast (this machine's fastest), float32 or bfloat16
    licence: str = ""  # of the teacher, an SPDX name; empty takes it from the teacher's model card
    tokenizer: str = ""  # for a server alone: the folder of the data's tokenizer, to compare with the server's

    def __post_init__(self) -> None:
        if self.precision not in ("fast", "float32", "bfloat16"):
            raise Error(f"precision '{self.precision}' is not known", where="teach", fix="fast, float32 or bfloat16")
        for name in ("window", "block_tokens", "batch", "temperature"):
            if not getattr(self, name) > 0:
                raise Error(f"{name} is {getattr(self, name)}, it must be above 0", where="teach")
        if self.block_tokens % self.window:
            what = f"block_tokens {self.block_tokens} is no multiple of window {self.window}"
            raise Error(what, where="teach", fix="choose one that is")


class Corpus(Shards, Protocol):
    """The data set that a teacher reads (gemstill.data.shards.TokenDataset is one)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def document_starts(self) -> NDArray[Any]: ...


def run(config: TeachConfig) -> Store:
    """Run the teacher over the data set, or the blocks that are still missing, and open the finished store.

    Raises:
        Error: a folder that cannot be read or written, a teacher and a data set of different tokenizers, a
            store begun with other settings (they are named), a teacher that gives NaN.
    """
    teacher, dataset, info = _open(config)
    return teach_model(teacher, dataset, config.output, info)


def plan(config: TeachConfig) -> dict[str, Any]:
    """What `run` will do: tokens, blocks done and to do, FLOPs, bytes, seconds on this machine."""
    teacher, dataset, info = _open(config)
    done = sum(block_path(config.output, block).exists() for block in range(info.num_blocks))
    per_row = config.estimator.entries * BITS_AN_ENTRY / 8
    figures = {
        "tokens": dataset.num_tokens,
        "blocks": info.num_blocks,
        "blocks_done": done,
        "bytes_per_token_about": round(per_row, 1),
        "disk_bytes_about": round(per_row * dataset.num_tokens),
        "precision": info.precision,
    }
    if not isinstance(teacher, ModelTeacher):
        return figures
    shape: Any = teacher.model.config
    left = max(0, dataset.num_tokens - done * info.block_tokens)
    per_token = 2 * (shape.body_parameters + shape.vocab_size * shape.hidden_size)
    # Attention: two products with half a window of keys on average.
    per_token += 2 * config.window * shape.num_layers * shape.num_heads * shape.head_dim
    flops = per_token * left
    return figures | {
        "teacher_parameters": shape.body_parameters + shape.embedding_parameters,
        "flops": flops,
        "seconds_at_least": round(flops / machine.probe().rate(getattr(torch, info.precision)) / 1e9, 1),
    }


def _open(config: TeachConfig) -> tuple[Teacher, TokenDataset, StoreInfo]:
    """The teacher, the data set, and what the store will be."""
    dataset = TokenDataset.open(config.data)
    tokenizer, entries = None, 0
    if config.teacher.startswith(SERVERS):
        expect_topk(config.estimator, config.teacher)
        tokenizer, entries = _tokenizer(config, dataset), int(config.estimator.parameter)
    dtype = None if config.precision == "fast" else getattr(torch, config.precision)
    teacher = open_teacher(
        config.teacher, dataset.tokenizer_fingerprint, dtype=dtype, device=machine.own_device(), tokenizer=tokenizer,
        entries=entries,
    )  # fmt: skip
    info = describe(
        teacher, dataset, estimator=config.estimator, window=config.window, block_tokens=config.block_tokens,
        batch=config.batch, temperature=config.temperature, seed=config.seed, licence=config.licence,
    )  # fmt: skip
    return teacher, dataset, info


def _tokenizer(config: TeachConfig, dataset: TokenDataset) -> Tokenizer | None:
    if not config.tokenizer:
        return None
    tokenizer = Tokenizer.open(config.tokenizer)
    if tokenizer.fingerprint != dataset.tokenizer_fingerprint:
        raise Error(
            f"is not the tokenizer that {config.data} was made with", where=config.tokenizer, fix="name that one"
        )
    return tokenizer


def describe(
    model: nn.Module | Teacher,
    dataset: Corpus,
    *,
    estimator: Estimator | str = "threshold(0.05)",
    window: int = 256,
    block_tokens: int = 65_536,
    batch: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    teacher: str = "unnamed",
    licence: str = "",
) -> StoreInfo:
    """What a store of this teacher over this data set is made of; the settings are TeachConfig's.

    model: a teacher, or a network, whose name and licence are then `teacher` and `licence`. Its head may have more
    rows than the data set's vocabulary has entries; they are never learned from. It may have none for the last few
    entries where these do not occur.

    Raises:
        Error: a vocabulary the teacher does not have, a block that is no whole number of windows, an estimator that
            cannot be taken from what the teacher gives.
    """
    known = as_teacher(model, teacher)
    stored = known.vocab_size or dataset.vocab_size
    vocab_size = entries_used(stored, dataset.vocab_size, [dataset], known.name)
    if stored < vocab_size:
        what = f"has a vocabulary of {stored}, the data set one of {vocab_size}"
        raise Error(what, where=known.name, fix="use a teacher of this tokenizer")
    if known.sparse:
        expect_topk(Estimator.parse(str(estimator)), known.name)
    return StoreInfo(
        known.name, known.fingerprint, licence or known.licence, dataset.tokenizer_fingerprint, dataset.fingerprint,
        dataset.num_tokens, vocab_size, stored, window, block_tokens, str(estimator), float(temperature), seed,
        batch, known.precision,
    )  # fmt: skip


def expect_topk(estimator: Estimator, where: str) -> None:
    """Refuse an estimator that needs a whole distribution, for a teacher that gives its likeliest entries alone."""
    if estimator.name != "topk":
        what = f"gives its likeliest entries alone, of which no {estimator} can be made"
        raise Error(
            what, where=where, fix="take topk, which is biased: --set estimator.name=topk estimator.parameter=20"
        )


def teach_model(model: nn.Module | Teacher, dataset: Corpus, folder: str | Path, info: StoreInfo) -> Store:
    """Teach all blocks that `folder` does not hold yet, finish the store and open it.

    model: a teacher, or a network called as model(tokens, documents=…, readout=…) like gemstill's Transformer.
    info: from `describe`. Any number of processes may teach into one folder at once, each the blocks that no other
    has begun. Bytes do not depend on that, on what was there before, or on the order of blocks.

    Raises:
        Error: as `run`.
    """
    folder = Path(folder)
    with Claims(folder) as claims:
        with claims.store():
            record = begin(folder, info, dataset)
        if not record.get("complete"):
            _teach_missing(model, dataset, folder, info, claims)
            with claims.store():
                finish(folder, info)
    return Store.open(folder, dataset)


def _teach_missing(model: nn.Module | Teacher, dataset: Corpus, folder: Path, info: StoreInfo, claims: Claims) -> None:
    """Teach, beside other processes, until all blocks are there: those of a process that died are taken over."""
    missing = missing_blocks(folder, info)
    todo = sum(stop - first for first, stop in map(info.span, missing))
    with Progress(info.num_tokens, "tokens", "teach", done=info.num_tokens - todo) as progress:
        while missing:
            waiting = True
            for block in missing:
                with claims.block(block) as mine:
                    if mine and not block_path(folder, block).exists():
                        teach_block(model, dataset, folder, info, block, progress)
                        waiting = False
            missing = missing_blocks(folder, info)
            if missing and waiting:
                time.sleep(PAUSE)


def missing_blocks(folder: Path, info: StoreInfo) -> list[int]:
    """The blocks that are not there yet."""
    return [block for block in range(info.num_blocks) if not block_path(folder, block).exists()]


def finish(folder: Path, info: StoreInfo) -> None:
    """Write the card and the index of a store whose blocks are all there, unless another process has."""
    if not files.read_json(folder / INDEX).get("complete"):
        digests = [files.sha256(block_path(folder, block)) for block in range(info.num_blocks)]
        files.write(folder / "README.md", store_card(info))
        write_index(folder, info, digests)  # last: with it the store is there


def begin(folder: Path, info: StoreInfo, dataset: Corpus) -> dict[str, Any]:
    """Begin a store in `folder`, or go on with the one there; returns the content of its store.json.

    Raises:
        Error: another store is there (the differences are named), or something else.
    """
    path = folder / INDEX
    if not path.exists():
        strangers = [item.name for item in folder.iterdir() if not item.name.startswith((".", INDEX, code.FILE))]
        if strangers:
            raise Error(f"holds other things ({strangers[0]})", where=folder, fix="name a new folder")
        if info.num_tokens == 0:
            raise Error("the data set has no tokens", where=folder)
        code.write(folder, code.IdCode.of(dataset, Estimator.parse(info.estimator).entries))
        write_index(folder, info, None)
    record: dict[str, Any] = files.read_json(path)
    there, ours = asdict(StoreInfo.parse(record, path)), asdict(info)
    changed = [f"{name} {there[name]!s:.24} became {ours[name]!s:.24}" for name in ours if there[name] != ours[name]]
    if changed:
        fix = "name another folder, or delete this one to begin anew"
        raise Error(f"was begun with other settings: {', '.join(changed)}", where=folder, fix=fix)
    return record


def teach_block(
    model: nn.Module | Teacher,
    dataset: Corpus,
    folder: Path,
    info: StoreInfo,
    block: int,
    progress: Progress | None = None,
) -> None:
    """Run the teacher over one block's windows and write the block: the unit of parallel work.

    Raises:
        Error: probabilities that are not finite, the block and the tokens of the batch named; nothing is written then.
    """
    teacher = as_teacher(model)
    first, stop = info.span(block)
    u = _uniforms(info, block, stop - first)
    tokens, documents = map(torch.from_numpy, _windows(dataset, info, first, stop))
    parts: list[Rows] = []
    done = 0
    for start in range(0, len(tokens), info.batch):
        rows = slice(start, start + info.batch)
        real = documents[rows] >= 0
        count = int(real.sum())
        try:
            with torch.inference_mode():
                target = teacher.distribution(tokens[rows], documents[rows])
                parts += _estimated(target, real.reshape(-1), info, u[done : done + count])
        except Error as error:
            where = f"{info.teacher}, block {block} (tokens {first + done} to {first + done + count})"
            raise Error(error.what, where=where, fix=error.fix) from error
        done += count
        if progress is not None:
            progress.advance(count)
    write_block(folder, info, block, parts)


def _windows(dataset: Corpus, info: StoreInfo, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens first..stop in windows, and the document of each: [windows, window] both; −1 fills the last window.

    Every window begins with bos, as those that a student reads (gemstill.data.loader.Batch).
    """
    count = -(-(stop - first) // info.window)
    tokens = np.zeros(count * info.window, np.int64)
    documents = np.full(count * info.window, -1, np.int64)
    tokens[: stop - first] = dataset.read(first, stop)
    tokens[:: info.window] = dataset.bos_id
    starts = np.asarray(dataset.document_starts)
    documents[: stop - first] = np.searchsorted(starts, np.arange(first, stop), side="right")
    return tokens.reshape(count, -1), documents.reshape(count, -1)


def _uniforms(info: StoreInfo, block: int, rows: int) -> Tensor:
    """The block's random numbers, [rows, uniforms + 1] float64: those of the draws, and one for rounding weights."""
    key = hashlib.sha256(f"{info.seed}/{block}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8")))
    return torch.from_numpy(generator.random((rows, Estimator.parse(info.estimator).uniforms + 1)))


def _estimated(target: Target | OnlineTarget, real: Tensor, info: StoreInfo, u: Tensor) -> list[Rows]:
    """What the store keeps of a batch's rows that are no padding, by real [B·T] bool; u: their random numbers."""
    if isinstance(target, Target):
        draw = _likeliest(target, real, info)
        return [encode(draw, info, u[:, -1].to(draw.ids.device))]
    estimator = Estimator.parse(info.estimator)
    head = target.head[: info.vocab_size].to(target.hidden.dtype)  # without padding: it can never be drawn
    hidden = target.hidden[real.to(head.device)]
    parts = []
    size = max(ROWS, LOGITS // len(head))
    for x, drawn in zip(torch.split(hidden, size), torch.split(u, size), strict=True):
        drawn = drawn.to(x.device)
        draw = estimator.of_logits(F.linear(x, head), drawn, target.softcap, target.temperature * info.temperature)
        parts.append(encode(draw, info, drawn[:, -1]))
    return parts


def _likeliest(target: Target, real: Tensor, info: StoreInfo) -> Draw:
    """The rows of a sparse target as `topk` keeps them."""
    ids, probs, _ = tempered(target, info.temperature)
    real = real.to(ids.device)
    ids, probs = ids[real], probs[real].double()
    if not bool(torch.isfinite(probs).all()) or not bool((probs.sum(1) > 0).all()):
        raise Error("probabilities are not finite", where="teacher")
    if int(ids.max()) >= info.vocab_size or int(ids.min()) < 0:
        what = f"names entry {int(ids.max())} of a vocabulary of {info.vocab_size}"
        raise Error(what, where="teacher", fix="use a teacher of this tokenizer")
    count = (probs > 0).sum(1)
    return Draw(torch.where(probs > 0, ids, 0), probs, count, torch.zeros_like(count))
