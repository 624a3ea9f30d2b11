"""`gemstill train`: open the data, build the model, run the loop, write the finished model."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemstill.core import machine
from gemstill.core.allocator import keep_freed_memory
from gemstill.core.config import dump
from gemstill.core.errors import Error
from gemstill.core.files import locked, read_json, sha256, write, write_json
from gemstill.core.notices import note
from gemstill.model.adapter import Adapter
from gemstill.model.transformer import Transformer
from gemstill.ops.native import why_not
from gemstill.train import student
from gemstill.train.config import TrainConfig, check_same, identity
from gemstill.train.flops import forward_flops, train_flops
from gemstill.train.heldout import Evaluation, evaluate
from gemstill.train.loop import Loop
from gemstill.train.objectives import FromStore, FromTeacher, Fused, NextToken
from gemstill.train.optimizer import Optimizer
from gemstill.train.parallel import Ranks, ranks, shard, whole
from gemstill.train.student import Shape

if TYPE_CHECKING:
    from gemstill.data.dataset import TokenDataset
    from gemstill.distill.store import Store
    from gemstill.distill.teachers import Teacher
    from gemstill.text.tokenizer import Tokenizer

RECIPE = "recipe.json"  # all that the run's result depends on; what a later command must agree with


@dataclasses.dataclass(frozen=True)
class _Data:
    """The opened sources of a run, in the recipe's order."""

    train: list[TokenDataset]
    heldout: list[TokenDataset]  # those that hold any document
    stores: list[Store]
    tokenizer: Tokenizer
    teacher: Teacher | None  # that answers while the student learns

    def fingerprints(self) -> dict[str, Any]:
        heldout = [dataset.fingerprint for dataset in self.heldout]
        from gemstill.distill.store import INDEX

        stores = [sha256(store.folder / INDEX) for store in self.stores]
        found = {"data_fingerprints": [d.fingerprint for d in self.train], "heldout_fingerprints": heldout,
                 "store_fingerprints": stores, "tokenizer_fingerprint": self.tokenizer.fingerprint}  # fmt: skip
        return found | ({"teacher_fingerprint": self.teacher.fingerprint} if self.teacher else {})


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as `config` says, or go on where an earlier process stopped, and write the model.

    The folder `config.run` gets config.yaml (settled, precision included), metrics.jsonl, tensorboard/,
    state/, model/ (a Hugging Face folder) and summary.json, whose content is returned. Under torchrun the
    run is sharded over its ranks. Killed at any moment, the same call goes on to the same bits.

    Raises:
        Error: data, store, tokenizer and model do not fit each other; the folder holds a run of another
            recipe or another process works in it; it cannot be written; the loss is not finite.
    """
    folder = Path(config.run)
    keep_freed_memory()
    with ranks() as here, locked(folder) if here.rank == 0 else nullcontext():
        data = _open(config)
        data = dataclasses.replace(data, teacher=_teacher(config, data, here))
        shape = student.shape_of(config.model, data.tokenizer, [*data.train, *data.heldout])
        # All ranks take the first one's word: measured speeds differ from process to process.
        config, recipe = here.share(_settle(config, shape, data, here) if here.rank == 0 else None)
        if here.rank == 0:
            write(folder / "config.yaml", dump(config))
            write_json(folder / RECIPE, recipe)
        loop = _loop(config, recipe, shape, data, here)
        loop.run()
        weights = whole(loop.model)
        summary: dict[str, Any] | None = None
        if here.rank == 0:
            summary = _finish(folder, config, loop, shape, weights, data)
        result: dict[str, Any] = here.share(summary)
        return result


def plan(config: TrainConfig) -> dict[str, Any]:
    """What `train(config)` would take, before anything runs: tokens, FLOPs, bytes of memory and disk, seconds.

    Raises:
        Error: as `train` does for data, store, tokenizer and model that do not fit each other.
    """
    data = _open(config)
    shape = student.shape_of(config.model, data.tokenizer, [*data.train, *data.heldout])
    settled, _ = _settle(config, shape, data, Ranks())
    parameters = shape.body_parameters + shape.embedding_parameters
    flops = train_flops(shape, config.data.window) * config.tokens_per_step * settled.steps
    width = 2 if settled.precision == "bfloat16" else 4
    states = 2 if config.optimizer.name == "adamw" else 1 + shape.embedding_parameters / parameters
    micro = min(config.micro_windows, config.windows_per_step) * config.data.window
    layer = 12 * shape.hidden_size + 4 * shape.intermediate_size + 4 * shape.num_heads * shape.head_dim
    kept = shape.num_layers * (shape.hidden_size if config.activation_checkpointing else layer)
    available = sum(dataset.num_tokens for dataset in data.train)
    tokens = settled.steps * config.tokens_per_step
    taught = _planned_teacher(config) * tokens
    return {
        "parameters": parameters,
        "parameters_without_embedding": shape.body_parameters,
        "steps": settled.steps,
        "tokens": tokens,
        "epochs": tokens / max(1, available),
        "flops": flops,
        **({"teacher_flops": taught} if taught else {}),
        "precision": settled.precision,
        "compile": settled.compile,
        "memory_bytes": int(4 * parameters * (2 + states) + micro * kept * width),
        "disk_bytes": int(4 * parameters * ((1 + states) * (config.keep_last + 2) + 1)),
        "seconds": (flops + taught) / _rate(settled.precision) / 0.5,  # half of the products' rate is usual
    }


def _open(config: TrainConfig) -> _Data:
    from gemstill.data.dataset import TokenDataset
    from gemstill.distill.store import Store
    from gemstill.text.tokenizer import Tokenizer

    sources = config.data.sources
    folders = [Path(source.folder) for source in sources]
    train_sets = [TokenDataset.open(folder / "train") for folder in folders]
    first = train_sets[0]
    for dataset, folder in zip(train_sets, folders, strict=True):
        if dataset.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise Error(f"was made with another tokenizer than {folders[0]}", where=folder, fix="make both with one")
        if dataset.num_tokens < config.data.window:
            raise Error(
                f"has {dataset.num_tokens} tokens, fewer than one window of {config.data.window}",
                where=folder, fix="take more text or a shorter data.window",
            )  # fmt: skip
    kept = [folder / "heldout" for folder in folders]
    heldout = [TokenDataset.open(folder) for folder in kept if (folder / "index.json").exists()]
    place = Path(config.data.tokenizer)
    tokenizer = Tokenizer.open(place)
    if tokenizer.fingerprint != first.tokenizer_fingerprint:
        what = f"is not the tokenizer that {folders[0]} was made with"
        raise Error(what, where=place, fix="name that one")
    stores = [
        Store.open(source.store, dataset=dataset, tokenizer=tokenizer, window=config.data.window)
        for source, dataset in zip(sources, train_sets, strict=True)
        if source.store
    ]
    return _Data(train_sets, [d for d in heldout if d.num_tokens >= config.data.window], stores, tokenizer, None)


def _teacher(config: TrainConfig, data: _Data, here: Ranks) -> Teacher | None:
    """The teacher that the recipe names, whole on every rank, in the run's precision."""
    if not config.teacher.source:
        return None
    from gemstill.distill.teachers import open_teacher

    return open_teacher(
        config.teacher.source, data.tokenizer.fingerprint, dtype=getattr(torch, _precision(config, here)),
        device=here.device, tokenizer=data.tokenizer, entries=config.teacher.entries,
    )  # fmt: skip


def _planned_teacher(config: TrainConfig) -> float:
    """Operations of a teacher at hand on one token."""
    from gemstill.checkpoint.foreign import shape_of
    from gemstill.distill.teachers import SERVERS

    place = config.teacher.source
    return forward_flops(shape_of(place), config.data.window) if place and not place.startswith(SERVERS) else 0.0


def _precision(config: TrainConfig, here: Ranks) -> str:
    """The dtype of the run's products; a run that was begun keeps what was decided then."""
    path = Path(config.run) / RECIPE
    saved = read_json(path) if path.exists() else {}
    if config.precision != "auto":
        return config.precision
    return str(saved.get("precision") or machine.fast_dtype(here.device.type)).removeprefix("torch.")


def _settle(config: TrainConfig, shape: Shape, data: _Data, here: Ranks) -> tuple[TrainConfig, dict[str, Any]]:
    """The recipe with all that was left to the machine decided, and what its result depends on.

    A run that was begun keeps what was decided then.
    """
    path = Path(config.run) / RECIPE
    saved = read_json(path) if path.exists() else {}
    if config.windows_per_step % here.world:
        raise Error(
            f"{config.windows_per_step} windows a step do not divide among {here.world} ranks",
            where="recipe", fix="make windows_per_step a multiple of the ranks",
        )  # fmt: skip
    precision: Any = _precision(config, here)
    compiling: Any = config.compile
    settled = dataclasses.replace(config, steps=config.total_steps, tokens=0, precision=precision)
    if compiling == "auto":
        compiling = saved.get("compile") or ("on" if here.device.type == "cuda" and here.world == 1 else "off")
    if compiling == "on" and here.world > 1:
        what = "compile is on with several ranks, which FSDP's hooks do not allow yet"
        raise Error(what, where="recipe", fix="set compile=off")
    settled = dataclasses.replace(settled, compile=compiling)
    recipe = identity(settled, model_shape=dataclasses.asdict(shape), **data.fingerprints())
    if saved:
        check_same(saved, recipe, config.run)
    return settled, recipe


def _rate(precision: str) -> float:
    """Operations a second of this machine's products in `precision`."""
    return 1e9 * max(1e-3, machine.probe().rate(getattr(torch, precision)))


def _loop(config: TrainConfig, recipe: dict[str, Any], shape: Shape, data: _Data, here: Ranks) -> Loop:
    from gemstill.data.loader import Loader

    if here.device.type == "cpu" and here.rank == 0 and (reason := why_not()):
        note(f"no native kernels ({reason}): training runs in plain PyTorch operations, slower")
    precision: torch.dtype = getattr(torch, config.precision)
    model = student.begin(config.model, shape, data.tokenizer, config.seed).to(here.device)
    model.compute_dtype = precision
    model.checkpointing = config.activation_checkpointing
    blocks = list(model.layers)
    # What autocast makes of a block's weights is its own matter: there they travel as they are kept.
    shard(model, blocks, here, precision if isinstance(model, Transformer) else torch.float32)
    compiled = config.compile == "on"
    if compiled:
        model.compile_blocks()
    objective = _objective(config, shape, data, compiled)
    weights = [source.weight for source in config.data.sources]
    pairs = list(zip(data.train, weights, strict=True))
    loader = Loader(pairs, config.data.window, config.windows_per_step, config.seed)

    def score(network: torch.nn.Module) -> Evaluation:
        size = min(config.micro_windows, config.windows_per_step // here.world)
        options = {"batch": size, "windows": config.evaluate_windows}
        parts = [evaluate(network, d, config.data.window, device=here.device, **options) for d in data.heldout]
        return Evaluation.join(parts)

    flops = train_flops(shape, config.data.window)
    rate = _rate(config.precision) if here.device.type == "cpu" else 0.0
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    optimizer = Optimizer(model.named_parameters(), config.optimizer, dtype=precision, matrices=matrices)
    return Loop(model, objective, loader, optimizer, config, recipe, here, score if data.heldout else None, flops, rate)


def _objective(config: TrainConfig, shape: Shape, data: _Data, compiled: bool) -> NextToken:
    fused = Fused(compiled, config.backward, config.seed)
    if data.teacher is not None:
        return FromTeacher(
            data.teacher, config.hard, config.steps, vocab_size=data.tokenizer.vocab_size, rows=shape.vocab_size,
            temperature=config.teacher.temperature, divergence=config.teacher.divergence, beta=config.teacher.beta,
            fused=fused,
        )  # fmt: skip
    if data.stores:
        return FromStore(data.stores, config.hard, config.steps, fused)
    return NextToken(fused)


def _finish(
    folder: Path, config: TrainConfig, loop: Loop, shape: Shape, weights: dict[str, torch.Tensor], data: _Data
) -> dict[str, Any]:
    from gemstill.train.card import model_card

    unit = 1 if sys.platform == "darwin" else 1024
    summary = {
        "parameters": shape.body_parameters + shape.embedding_parameters,
        "parameters_without_embedding": shape.body_parameters,
        "steps": loop.step,
        "tokens_seen": loop.tokens,
        "flops": loop.flops * loop.tokens,
        **_teacher_flops(config, loop, data),
        "loss": loop.last.get("loss", math.nan),
        **loop.heldout,
        "seconds": loop.seconds,
        "tokens_per_second": loop.tokens / loop.seconds if loop.seconds else 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "precision": config.precision,
        "compiled": config.compile == "on",
        "ranks": loop.here.world,
    }
    taught = (data.teacher.name, data.teacher.licence) if data.teacher else None
    card = model_card(config, shape, summary, [store.info for store in data.stores], _start(config), taught)
    assert isinstance(loop.model, Transformer | Adapter)
    student.write(loop.model, weights, data.tokenizer, folder / "model", card)
    write_json(folder / "summary.json", summary)
    return summary


def _teacher_flops(config: TrainConfig, loop: Loop, data: _Data) -> dict[str, float]:
    """Operations of the teacher's forward passes, where it ran here."""
    shape = getattr(getattr(data.teacher, "model", None), "config", None)
    return {"teacher_flops": forward_flops(shape, config.data.window) * loop.tokens} if shape else {}


def _start(config: TrainConfig) -> tuple[str, str] | None:
    """Name and licence of the model that training starts from."""
    if not config.model.start:
        return None
    from gemstill.checkpoint import foreign, sidecars, source

    return source.name_of(config.model.start), sidecars.licence(foreign.place_of(config.model.start))
