"""`gemstill teach`: run a teacher once over a data set and keep its distributions in a probability store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gemstill.checkpoint import sidecars, source
from gemstill.core import files, machine
from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.dataset import TokenDataset
from gemstill.distill import code
from gemstill.distill.block import Rows, block_path, encode, write_block
from gemstill.distill.card import store_card
from gemstill.distill.estimators import Estimator
from gemstill.distill.store import INDEX, Shards, Store, StoreInfo, write_index
from gemstill.model.transformer import Transformer
from gemstill.ops.native import loaded

# Held at once: so many logits, but no fewer rows than make reading a large head worth while. Fixed, since the
# shapes of products decide their last bits.
LOGITS, ROWS = 1 << 22, 128
BITS_AN_ENTRY = 14  # with its weight, if it has one, and its share of what a row takes; measured in docs/distill.md


@dataclass(frozen=True)
class TeachConfig:
    """A teacher over a data set into a store."""

    teacher: str  # a model: a folder, a .gguf file, a name on the hub
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
    def document_starts(self) -> NDArray[Any]: ...


def run(config: TeachConfig) -> Store:
    """Run the teacher over the data set, or the blocks that are still missing, and open the finished store.

    Raises:
        Error: a folder that cannot be read or written, a teacher and a data set of different tokenizers, a
            store begun with other settings (they are named), another process at work, a teacher that gives NaN.
    """
    model, dataset, info = _open(config)
    return teach_model(model, dataset, config.output, info)


def plan(config: TeachConfig) -> dict[str, Any]:
    """What `run` will do: tokens, blocks done and to do, FLOPs, bytes, seconds on this machine."""
    model, dataset, info = _open(config)
    shape = model.config
    done = sum(block_path(config.output, block).exists() for block in range(info.num_blocks))
    per_token = 2 * (shape.body_parameters + shape.vocab_size * shape.hidden_size)
    # Attention: two products with half a window of keys on average.
    per_token += 2 * config.window * shape.num_layers * shape.num_heads * shape.head_dim
    left = max(0, dataset.num_tokens - done * info.block_tokens)
    per_row = config.estimator.entries * BITS_AN_ENTRY / 8
    rate = machine.probe().rate(model.compute_dtype or torch.float32) * 1e9
    return {
        "tokens": dataset.num_tokens,
        "blocks": info.num_blocks,
        "blocks_done": done,
        "teacher_parameters": shape.body_parameters + shape.embedding_parameters,
        "flops": per_token * left,
        "bytes_per_token_about": round(per_row, 1),
        "disk_bytes_about": round(per_row * dataset.num_tokens),
        "seconds_at_least": round(per_token * left / rate, 1),
        "precision": info.precision,
    }


def _open(config: TeachConfig) -> tuple[Transformer, TokenDataset, StoreInfo]:
    """The teacher, set to its precision, the data set, and what the store will be."""
    place = source.find(config.teacher)
    model, tokenizer = source.load(place)
    dataset = TokenDataset.open(config.data)
    if tokenizer.fingerprint != dataset.tokenizer_fingerprint:
        ours, theirs = tokenizer.fingerprint[:16], dataset.tokenizer_fingerprint[:16]
        raise Error(
            f"the teacher's tokenizer is {ours}, the data set was made with {theirs}",
            where=config.teacher,
            fix="make the data set with the teacher's tokenizer",
        )
    loaded()  # native kernels from the first block on, so that a store's bytes do not depend on when they are built
    model.compute_dtype = machine.fast_dtype() if config.precision == "fast" else getattr(torch, config.precision)
    info = describe(
        model, dataset, estimator=config.estimator, window=config.window, block_tokens=config.block_tokens,
        batch=config.batch, temperature=config.temperature, seed=config.seed, teacher=source.name_of(config.teacher),
        licence=config.licence or sidecars.licence(place),
    )  # fmt: skip
    return model, dataset, info


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's configuration, and the names, dtypes, shapes and bytes of its parameters."""
    config = getattr(model, "config", None)
    described = asdict(config) if is_dataclass(config) and not isinstance(config, type) else None
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(
    model: nn.Module,
    dataset: Corpus,
    *,
    estimator: Estimator | str = "threshold(0.05)",
    window: int = 256,
    block_tokens: int = 65_536,
    batch: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    teacher: str = "unnamed",
    licence: str = "unknown",
) -> StoreInfo:
    """What a store of this model over this data set is made of; the settings are TeachConfig's.

    model: its head may have more rows than the data set's vocabulary has entries; they are never learned from.

    Raises:
        Error: a vocabulary the model does not have, a block that is no whole number of windows.
    """
    dtype = getattr(model, "compute_dtype", None) or next(model.parameters()).dtype
    shape = getattr(model, "config", None)
    stored = dataset.vocab_size if shape is None else int(shape.vocab_size)
    if stored < dataset.vocab_size:
        what = f"has a vocabulary of {stored}, the data set one of {dataset.vocab_size}"
        raise Error(what, where=teacher, fix="use a teacher of this tokenizer")
    return StoreInfo(
        teacher, fingerprint(model), licence, dataset.tokenizer_fingerprint, dataset.fingerprint, dataset.num_tokens,
        dataset.vocab_size, stored, window, block_tokens, str(estimator), float(temperature), seed, batch,
        str(dtype).removeprefix("torch."),
    )  # fmt: skip


def teach_model(model: nn.Module, dataset: Corpus, folder: str | Path, info: StoreInfo) -> Store:
    """Teach all blocks that `folder` does not hold yet, finish the store and open it.

    model: called as model(tokens [B, T], documents=[B, T], readout=…) like gemstill's Transformer.
    info: from `describe`. Bytes do not depend on what was there before or on the order of blocks.

    Raises:
        Error: as `run`.
    """
    folder = Path(folder)
    with files.locked(folder):
        record = begin(folder, info, dataset)
        if record.get("complete"):
            return Store.open(folder, dataset)
        missing = [block for block in range(info.num_blocks) if not block_path(folder, block).exists()]
        todo = sum(stop - first for first, stop in map(info.span, missing))
        with Progress(info.num_tokens, "tokens", "teach", done=info.num_tokens - todo) as progress:
            for block in missing:
                teach_block(model, dataset, folder, info, block, progress)
        digests = [files.sha256(block_path(folder, block)) for block in range(info.num_blocks)]
        files.write(folder / "README.md", store_card(info))
        write_index(folder, info, digests)  # last: with it the store is there
    return Store.open(folder, dataset)


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
    model: nn.Module, dataset: Corpus, folder: Path, info: StoreInfo, block: int, progress: Progress | None = None
) -> None:
    """Run the teacher over one block's windows and write the block: the unit of parallel work.

    Raises:
        Error: probabilities that are not finite, the block and its tokens named; nothing is written then.
    """
    first, stop = info.span(block)
    readout = _Estimate(info, _uniforms(info, block, stop - first))
    device = next(model.parameters()).device
    tokens, documents = (torch.from_numpy(part).to(device) for part in _windows(dataset, info, first, stop))
    try:
        for start in range(0, len(tokens), info.batch):
            rows = slice(start, start + info.batch)
            before = readout.rows
            with torch.inference_mode():
                readout.real = documents[rows] >= 0
                model(tokens[rows], documents=documents[rows], readout=readout)
            if progress is not None:
                progress.advance(readout.rows - before)
    except Error as error:
        where = f"{info.teacher}, block {block} (tokens {first} to {stop})"
        raise Error(error.what, where=where, fix=error.fix) from error
    write_block(folder, info, block, readout.parts)


def _windows(dataset: Corpus, info: StoreInfo, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens first..stop in windows, and the document of each: [windows, window] both; −1 fills the last window."""
    count = -(-(stop - first) // info.window)
    tokens = np.zeros(count * info.window, np.int64)
    documents = np.full(count * info.window, -1, np.int64)
    tokens[: stop - first] = dataset.read(first, stop)
    starts = np.asarray(dataset.document_starts)
    documents[: stop - first] = np.searchsorted(starts, np.arange(first, stop), side="right")
    return tokens.reshape(count, -1), documents.reshape(count, -1)


def _uniforms(info: StoreInfo, block: int, rows: int) -> Tensor:
    """The block's random numbers, [rows, uniforms + 1] float64: those of the draws, and one for rounding weights."""
    key = hashlib.sha256(f"{info.seed}/{block}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], "<u8")))
    return torch.from_numpy(generator.random((rows, Estimator.parse(info.estimator).uniforms + 1)))


class _Estimate:
    """A readout that turns last hidden states into a block's encoded rows, a few at a time."""

    def __init__(self, info: StoreInfo, u: Tensor) -> None:
        self.info, self.u = info, u
        self.estimator = Estimator.parse(info.estimator)
        self.parts: list[Rows] = []
        self.rows = 0  # done so far
        self.real: Tensor  # [B, T] bool: which positions of the coming batch are no padding

    def __call__(self, hidden: Tensor, head: Tensor, softcap: float | None) -> None:
        flat = hidden[self.real]
        cast = head[: self.info.vocab_size].to(hidden.dtype)  # without padding: it can never be drawn
        for x in torch.split(flat, max(ROWS, LOGITS // len(cast))):
            z = F.linear(x, cast).float()
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            probs = (z / self.info.temperature).softmax(1)
            u = self.u[self.rows : self.rows + len(x)].to(probs.device)
            self.parts.append(encode(self.estimator(probs, u), self.info, u[:, -1]))
            self.rows += len(x)
