"""`gemstill shrink SOURCE TARGET.gguf`: a four-bit file that says nearly what the unquantized model says.

Every step is a function of its own; this script calls them in order. Killed at any moment, the same call goes on
where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemstill.core import files
from gemstill.core.config import as_dict
from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.core.steps import Steps
from gemstill.data.sources import Source
from gemstill.train.config import LoopConfig, OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gemstill.data.calibration import Calibration
    from gemstill.model.config import ModelConfig
    from gemstill.ops.rounding import Rounded
    from gemstill.text.tokenizer import Tokenizer

SPREAD = 4  # times the held-out text that is read: so many more passages that it is taken from
EVALUATIONS = 4  # during training
BATCH = 4  # pieces run at once without gradients
SHARE = 0.4  # of the products' rate that training reaches


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """`gemstill shrink`."""

    source: str  # a model: a folder, a .gguf file, a name on the hub
    target: Path  # the file to write, ending in .gguf
    data: Source  # the text to learn on: prose, or what the model is used for
    run: str = "runs/shrink"  # folder of the run
    tokens: int = 100_000  # trained on; 0 leaves it at the data-driven rounding
    window: int = 512  # tokens of one piece of text
    windows_per_step: int = 2  # pieces of one optimizer step
    calibration_tokens: int = 16_384  # of the text, that the data-driven rounding sees
    heldout_tokens: int = 4096  # of held-out text, that roundings are compared on
    heldout_fraction: float = 0.05  # part of the documents kept for measuring, chosen by hash of their content
    code_rate: float = 0.01  # learning rate of codes, in steps of their blocks
    scale_rate: float = 0.0005  # of the logarithms of scales, and of norms' gains
    rows: int = 32_768  # of embedding and head, that learn at most: of the tokens that matter most in the text
    seed: int = 0  # of the pieces and their order

    def __post_init__(self) -> None:
        sizes = ("window", "windows_per_step", "calibration_tokens", "heldout_tokens", "rows")
        for name in (*sizes, "code_rate", "scale_rate"):
            if not getattr(self, name) > 0:
                raise Error(f"{name} is {getattr(self, name)}", where="shrink", fix="it must be above 0")
        if self.tokens < 0 or self.window < 2:
            what = f"tokens is {self.tokens} and window is {self.window}"
            raise Error(what, where="shrink", fix="tokens is 0 or more, window 2 or more")
        if Path(self.target).suffix != ".gguf":
            raise Error("is no name of a GGUF file", where=self.target, fix="let it end in .gguf")


def run(config: ShrinkConfig) -> dict[str, Any]:
    """Do what is not yet done, write the file and the run's summary.json; the figures of each rounding.

    Raises:
        Error: the source cannot be opened or has widths that 32 does not divide, there is too little text, something
            else than a GGUF file is at the target, the folder holds a run of another recipe.
    """
    check(config)
    folder = Path(config.run)
    with files.locked(folder):
        recipe = {key: value for key, value in as_dict(config).items() if key not in ("run", "target")}
        steps = Steps(folder, recipe=recipe)
        steps.do("text", lambda: _text(config))
        steps.do("round", lambda: _round(config))
        if config.tokens:
            steps.do("train", lambda: _train(config, best(steps)))
        steps.do("compare", lambda: _compare(config, steps))
        chosen = best(steps)
        with files.writing(config.target) as temporary:
            shutil.copyfile(folder / f"{chosen}.gguf", temporary)
        summary = summarise(config, steps, chosen)
        files.write_json(folder / "summary.json", summary)
    return summary


def plan(config: ShrinkConfig) -> dict[str, Any]:
    """What `run(config)` would take, before anything runs."""
    from gemstill.checkpoint.source import shape_of
    from gemstill.core.machine import fast_dtype, probe
    from gemstill.train.flops import forward_flops

    check(config)
    shape = shape_of(config.source)
    whole = forward_flops(shape, config.window)
    head = 2 * shape.vocab_size * shape.hidden_size
    part = min(1.0, config.rows / shape.vocab_size)
    body = whole - head
    parameters = shape.body_parameters + shape.embedding_parameters
    flops = {
        # Two streams through the blocks, each matrix's inputs twice; the factorizations are small beside.
        "round": 4 * body * config.calibration_tokens + 5 * whole * config.heldout_tokens,
        "train": (4 * body + 4 * part * head) * config.tokens + 2 * EVALUATIONS * whole * config.heldout_tokens,
        "compare": 6 * whole * config.heldout_tokens,
    }
    total = sum(flops.values())
    return {
        "parameters": parameters,
        "bytes": parameters * 18 // 32,
        "tokens": config.tokens,
        "steps": config.tokens // (config.window * config.windows_per_step),
        **{f"flops of {name}": value for name, value in flops.items()},
        "flops": total,
        "seconds": total / (1e9 * probe().rate(fast_dtype()) * SHARE),
    }


def check(config: ShrinkConfig) -> None:
    """Refuse what cannot be shrunk before anything is done.

    Raises:
        Error: something else than a GGUF file is at the target, or widths that blocks do not divide.
    """
    from gemstill.checkpoint.source import shape_of

    target = Path(config.target)
    if target.is_dir():
        raise Error("is a folder", where=target, fix="name a file ending in .gguf")
    if target.exists() and target.open("rb").read(4) != b"GGUF":
        raise Error("is there already and is no GGUF file", where=target, fix="name another target")
    shape = shape_of(config.source)
    widths = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_heads · head_dim": shape.num_heads * shape.head_dim,
    }
    for name, width in widths.items():
        if width % 32:
            what = f"{name} is {width}, which Q4_0's blocks of 32 do not divide"
            raise Error(what, where=config.source, fix="export it in f16 or bf16")


def _text(config: ShrinkConfig) -> dict[str, int]:
    from gemstill.data.passages import write_passages

    return write_passages(
        config.data,
        Path(config.run) / "text",
        window=config.window,
        train=max(config.tokens, config.calibration_tokens),
        heldout=SPREAD * config.heldout_tokens,
        heldout_fraction=config.heldout_fraction,
    )


def text_of(config: ShrinkConfig, tokenizer: Tokenizer, split: str, tokens: int) -> Calibration:
    """Pieces of the run's train or heldout text, each from the beginning mark on."""
    from gemstill.data.calibration import calibration

    return calibration(
        tokenizer.encode, tokenizer.bos_id, str(Path(config.run) / "text" / f"{split}.jsonl"), tokens=tokens,
        window=config.window, seed=config.seed,
    )  # fmt: skip


def _round(config: ShrinkConfig) -> dict[str, Any]:
    """Both roundings, plain.gguf and gptq.gguf, and how far each is from the reference on held-out text."""
    from gemstill.checkpoint.source import load
    from gemstill.distill.gptq import round_network
    from gemstill.ops.blocks import quantize
    from gemstill.ops.rounding import unpack
    from gemstill.train.divergence import divergence, logits_of

    model, tokenizer = load(config.source)
    heldout = text_of(config, tokenizer, "heldout", config.heldout_tokens)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    norms = {name: weight for name, weight in weights.items() if weight.ndim == 1}
    found = {
        "plain": {name: unpack(quantize(matrix, "q4_0")) for name, matrix in weights.items() if name not in norms},
        "gptq": round_network(model, text_of(config, tokenizer, "train", config.calibration_tokens)),
    }
    out = {}
    for name, rounded in found.items():
        write(model.config, norms, tokenizer, rounded, Path(config.run) / f"{name}.gguf")
        other, _ = load(Path(config.run) / f"{name}.gguf")
        out[name] = divergence(logits_of(model), logits_of(other), heldout).figures()
    return out


def write(
    config: ModelConfig,
    norms: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    rounded: Mapping[str, Rounded],
    path: Path,
) -> None:
    """A network's norms and its matrices as they are rounded, by our names, as a GGUF file of Q4_0 throughout."""
    import torch

    from gemstill.checkpoint.source import save
    from gemstill.model.quantized import put_weights
    from gemstill.model.transformer import Transformer
    from gemstill.ops.packed import from_blocks

    with torch.device("meta"):
        model = Transformer(config)
    blocks = {name: from_blocks(each.data(), "Q4_0") for name, each in rounded.items()}
    # As gains in the file give them back, so that it needs no fields for what those round.
    exact = {name: (1 + norm.float()) - 1 for name, norm in norms.items()}
    put_weights(model, {**exact, **blocks})
    save(model, tokenizer, path)


def read(path: Path) -> dict[str, Rounded]:
    """The matrices of such a file, by our names."""
    from gemstill.checkpoint.source import load
    from gemstill.model.quantized import named_weights
    from gemstill.ops.packed import Packed
    from gemstill.ops.rounding import unpack

    weights = named_weights(load(path, quantize="file")[0])
    return {name: unpack(weight.unpack()[0]) for name, weight in weights if isinstance(weight, Packed)}


def best(steps: Steps) -> str:
    """The rounding that is nearest to the reference so far."""
    found = steps.result("round") | ({"trained": steps.result("train")} if "train" in steps.done else {})
    chosen: str = min(found, key=lambda name: float(found[name]["kl"]))
    return chosen


def training(config: ShrinkConfig) -> LoopConfig:
    """The loop that trains the masters. Matrices learn codes, all else by `embedding_rate`."""
    each = config.window * config.windows_per_step
    steps = max(1, config.tokens // each)
    return LoopConfig(
        run=str(Path(config.run) / "train"),
        seed=config.seed,
        steps=steps,
        windows_per_step=config.windows_per_step,
        micro_windows=config.windows_per_step,
        compile="off",
        evaluate_every=-(-steps // EVALUATIONS),
        keep_last=1,
        optimizer=OptimizerConfig("adamw", config.code_rate, config.scale_rate, [0.9, 0.95], weight_decay=0.0),
        schedule=ScheduleConfig(warmup=0.05, final=0.05),
    )


def _train(config: ShrinkConfig, start: str) -> dict[str, Any]:
    """Train from a rounding and write trained.gguf, the best of all evaluations, the start itself among them."""
    import numpy as np

    from gemstill.checkpoint.source import load
    from gemstill.core.allocator import keep_freed_memory
    from gemstill.distill.teachers import ModelTeacher
    from gemstill.train.divergence import divergence, logits_of
    from gemstill.train.heldout import Evaluation
    from gemstill.train.loop import Loop
    from gemstill.train.optimizer import Optimizer
    from gemstill.train.rounded import FromReference, Pieces, likely, round_model

    keep_freed_memory()
    reference, tokenizer = load(config.source)
    reference.requires_grad_(False)
    text = text_of(config, tokenizer, "train", config.tokens)
    heldout = text_of(config, tokenizer, "heldout", config.heldout_tokens)
    teacher = ModelTeacher(reference, name=config.source)
    rows = likely(teacher, text, config.rows) if config.rows < reference.config.vocab_size else None
    model, matrices = round_model(reference, read(Path(config.run) / f"{start}.gguf"), rows)

    def score(network: nn.Module) -> Evaluation:
        network.eval()
        found = divergence(logits_of(reference), logits_of(network), heldout)
        network.train()
        return Evaluation(np.array([found.kl]), np.array([found.positions]), 1.0)

    recipe = training(config)
    named = [(name, p) for name, p in model.named_parameters()]
    optimizer = Optimizer(named, recipe.optimizer, matrices=[matrix.codes for matrix in matrices.values()])
    loop = Loop(
        model, FromReference(teacher, rows), Pieces(text, config.windows_per_step, config.seed), optimizer, recipe, {},
        evaluate=score,
    )  # fmt: skip
    Path(recipe.run).mkdir(parents=True, exist_ok=True)
    loop.run()
    assert loop.best is not None
    kl, step = loop.best
    loop.states.load(step, {"model": {name: p.detach() for name, p in model.named_parameters()}})
    norms = {name: p.detach() for name, p in model.named_parameters() if name.endswith("norm.weight")}
    rounded = {name: each.rounded() for name, each in matrices.items()}
    write(reference.config, norms, tokenizer, rounded, Path(config.run) / "trained.gguf")
    shutil.rmtree(Path(config.run) / "train" / "state", ignore_errors=True)
    return {"kl": kl, "best_step": step, "steps": loop.step, "tokens": loop.tokens, "seconds_of_run": loop.seconds}


def _compare(config: ShrinkConfig, steps: Steps) -> dict[str, Any]:
    """Each file against the reference in float32, on the same held-out text: read and run by llama.cpp, or by us."""
    import torch

    from gemstill.checkpoint.source import load
    from gemstill.train.divergence import divergence, logits_in_llama_cpp, logits_of

    reference, tokenizer = load(config.source, dtype=torch.float32)
    heldout = text_of(config, tokenizer, "heldout", config.heldout_tokens)
    out: dict[str, Any] = {}
    for name in made(steps):
        path = Path(config.run) / f"{name}.gguf"
        theirs = logits_in_llama_cpp(path, config.window)
        if theirs is None:
            note("llama-cpp-python is not installed: the files are read by gemstill alone", where=config.run)
        other = theirs or logits_of(load(path, dtype=torch.float32)[0])
        found = divergence(logits_of(reference), other, heldout, name)
        out[name] = {"bytes": path.stat().st_size, "reader": "llama.cpp" if theirs else "gemstill", **found.figures()}
    return out


def made(steps: Steps) -> list[str]:
    """The roundings of a run, whose files lie in its folder."""
    return [*steps.result("round"), *(["trained"] if "train" in steps.done else [])]


def summarise(config: ShrinkConfig, steps: Steps, chosen: str) -> dict[str, Any]:
    """The figures of each rounding, and how much of what plain rounding loses each gives back."""
    found = steps.result("compare")
    lost = found["plain"]["kl"]
    rows = {name: row | {"recovered": 1 - row["kl"] / lost if lost else 0.0} for name, row in found.items()}
    return {"file": str(config.target), "rounding": chosen, **rows, "seconds": steps.seconds}
