"""`gemstill prune SOURCE TARGET`: a smaller network from a trained one, to be healed by distillation."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gemstill.checkpoint import foreign, sidecars, source
from gemstill.checkpoint.huggingface import check_replaceable
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.data.calibration import OWN, Calibration, calibration
from gemstill.distill.importance import SCORED, Depth, channel_importance, choose_blocks, fits, largest, loss_of
from gemstill.distill.layouts import MATRICES, Prunable, cut
from gemstill.model.adapter import Adapter, ForeignConfig
from gemstill.model.config import ModelConfig

MULTIPLE = 32  # weights of a block in llama.cpp's simple formats (Q8_0, Q4_0)


@dataclass(frozen=True)
class PruneConfig:
    """A trained model, and how much of it is kept."""

    source: str  # a model: a folder, a .gguf file, a name on the hub; its blocks are laid out like Gemma's or Llama's
    target: Path  # the folder of the smaller model
    layers: int | None = None  # blocks that are kept; null keeps all
    intermediate_size: int | None = None  # MLP channels kept in each block, a multiple of 32; null keeps all
    layer_pattern: int | None = None  # of the kept blocks every n-th is global; null keeps the source's n
    text: str = (
        ""  # to measure on: a folder or file of text, or a data set's shards; empty: Python's language reference
    )
    tokens: int = 4096  # of that text
    window: int = 512  # tokens of one piece of it
    seed: int = 0  # of which pieces

    def __post_init__(self) -> None:
        for name in ("layers", "intermediate_size", "layer_pattern", "tokens", "window"):
            value = getattr(self, name)
            if value is not None and value < 1 + (name == "window"):
                raise Error(f"{name} is {value}", where="prune", fix=f"it must be above {int(name == 'window')}")
        if self.layers is None and self.intermediate_size is None:
            fix = "give --layers, --intermediate-size or both"
            raise Error("nothing says how much is kept", where="prune", fix=fix)
        if (width := self.intermediate_size) is not None and width % MULTIPLE:
            near = sorted({max(1, width // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE})
            what = f"intermediate_size {width} is no multiple of {MULTIPLE}, as block formats want it"
            raise Error(what, where="prune", fix=f"take {' or '.join(map(str, near))}")
        if Path(self.target).suffix == source.GGUF:
            what = "is the name of a file; a folder is written, with a card that says what was kept"
            raise Error(what, where=self.target, fix="name a folder, then `gemstill export` it")


def run(config: PruneConfig) -> dict[str, Any]:
    """Measure, choose, cut and write the smaller model; its figures.

    Raises:
        Error: more is to be kept than there is, the local and global blocks that there are do not make the
            pattern, no text to measure on, a target that holds anything but a checkpoint of ours, a model that
            cannot be opened or has blocks of another layout.
    """
    check_replaceable(config.target)
    place = foreign.place_of(config.source)
    model, tokenizer = foreign.open_any(place)
    whole, net = model.config, Prunable(model)
    kinds, wanted = kinds_of(whole, config)
    text = calibration(
        tokenizer.encode, tokenizer.bos_id, config.text, tokens=config.tokens, window=config.window,
        seed=config.seed, fingerprint=tokenizer.fingerprint,
    )  # fmt: skip
    depth = choose_blocks(net, text, kinds, wanted, seed=config.seed)
    width = config.intermediate_size or whole.intermediate_size
    importance = channel_importance(net, text, depth.kept)
    channels = [largest(each, width) for each in importance]
    shape = shape_after(whole, config)
    cut(net, shape if isinstance(shape, ModelConfig) else None, depth.kept, channels)
    loss = loss_of(net, text, seed=config.seed)
    figures = _figures(whole, model.config)
    card = _card(config, figures, text, depth, importance, channels, loss, sidecars.licence(place))
    if isinstance(model, Adapter):
        weights = {name: p.detach() for name, p in model.named_parameters()}
        foreign.save_foreign(model, weights, tokenizer, config.target, card=card)
    else:
        source.save(model, tokenizer, config.target, card=card)
    return figures | {
        "kept_layers": ", ".join(map(str, depth.kept)),
        "loss_before": depth.base,
        "loss_without_layers": depth.loss,
        "loss_pruned": loss,
    }


def plan(config: PruneConfig) -> dict[str, Any]:
    """What `run(config)` would make and take. Raises Error as `run` does for sizes and for the target."""
    check_replaceable(config.target)
    whole = foreign.shape_of(config.source)
    wanted = kinds_of(whole, config)[1]
    # Each round runs, at most for every block that is left, the blocks after it and the head.
    passes = range(whole.num_layers, len(wanted), -1)
    blocks = sum(n + n * (n - 1) / 2 for n in passes) + 2 * whole.num_layers
    body = 2 * whole.body_parameters / whole.num_layers * config.tokens
    head = 2 * whole.vocab_size * whole.hidden_size * min(SCORED, config.tokens)
    flops = body * blocks + head * (sum(passes) + len(passes) + 2)
    return _figures(whole, shape_after(whole, config)) | {
        "calibration_text": config.text or OWN,
        "calibration_tokens": config.tokens,
        "flops_at_most": flops,
        "seconds_at_most": flops / (1e9 * machine.probe().rate(machine.fast_dtype())),
    }


def kinds_of(whole: ModelConfig | ForeignConfig, config: PruneConfig) -> tuple[list[bool], list[bool]]:
    """Which blocks are global, of those there are and of those that stay.

    Raises:
        Error: more is to be kept than there is, all of it is, or local and global blocks cannot make the pattern.
    """
    for name in ("layers", "intermediate_size"):
        wanted, most = getattr(config, name), {"layers": whole.num_layers}.get(name, whole.intermediate_size)
        if wanted is not None and wanted > most:
            raise Error(f"{name} is {wanted}, the model has {most}", where=config.source, fix="keep fewer")
    count = config.layers or whole.num_layers
    if count == whole.num_layers and (config.intermediate_size or whole.intermediate_size) == whole.intermediate_size:
        raise Error("all of the model would be kept", where=config.source, fix="keep fewer layers or channels")
    there = [not whole.is_local(block) for block in range(whole.num_layers)]
    if isinstance(whole, ForeignConfig):
        if config.layer_pattern is not None:
            raise Error("layer_pattern is for Gemma alone", where=config.source, fix="leave it out")
        return there, there[:count]  # of one kind, as Prunable sees to
    pattern = config.layer_pattern or whole.layer_pattern
    kept = [not replace(whole, layer_pattern=pattern).is_local(block) for block in range(count)]
    if not fits(there, kept):
        what = f"among its {len(there)} blocks there are no {count}, in order, of which every {pattern}. is global"
        raise Error(what, where=config.source, fix="keep another number of layers or set another layer_pattern")
    return there, kept


def shape_after(whole: ModelConfig | ForeignConfig, config: PruneConfig) -> ModelConfig | ForeignConfig:
    """What is left of a network."""
    layers = config.layers or whole.num_layers
    width = config.intermediate_size or whole.intermediate_size
    if isinstance(whole, ModelConfig):
        pattern = config.layer_pattern or whole.layer_pattern
        return replace(whole, num_layers=layers, intermediate_size=width, layer_pattern=pattern)
    norm = whole.hidden_size  # the last one, which is no block's
    block = (whole.body_parameters - norm) // whole.num_layers
    body = norm + layers * (block - len(MATRICES) * whole.hidden_size * (whole.intermediate_size - width))
    return replace(
        whole, num_layers=layers, intermediate_size=width, body_parameters=body,
        local_layers=whole.local_layers[:layers],
    )  # fmt: skip


def _figures(whole: ModelConfig | ForeignConfig, shape: ModelConfig | ForeignConfig) -> dict[str, Any]:
    return {
        "layers": f"{shape.num_layers} of {whole.num_layers}",
        "channels": f"{shape.intermediate_size} of {whole.intermediate_size}",
        "parameters": shape.body_parameters + shape.embedding_parameters,
        "parameters_without_embedding": shape.body_parameters,
        "part_without_embedding": shape.body_parameters / whole.body_parameters,
    }


def _card(
    config: PruneConfig,
    figures: dict[str, Any],
    text: Calibration,
    depth: Depth,
    importance: list[Tensor],
    channels: list[Tensor],
    loss: float,
    licence: str,
) -> str:
    """README.md with the Hub's header: what was kept, by which figures, and the source's licence."""
    name = source.name_of(config.source)
    gone = {block: f"{after:.3f}" for block, after in depth.dropped}
    blocks = [
        f"| {block} | {turn:.4f} | {f'{depth.alone[block]:+.3f}' if depth.alone else ''} | "
        f"{f'no; {gone[block]} after it went' if block in gone else 'yes'} |"
        for block, turn in enumerate(depth.influence)
    ]
    widths = []
    for block, each, keep in zip(depth.kept, importance, channels, strict=True):
        part = float(each[keep].double().square().sum() / each.double().square().sum().clamp(min=1e-300))
        widths.append(f"| {block} | {part:.2%} | `{_bits(keep, len(each))}` |")
    header = {"license": "other" if licence == "unknown" else licence, "library_name": "transformers"}
    lines = [
        *("---", *(f"{key}: {json.dumps(value)}" for key, value in header.items())),
        "pipeline_tag: text-generation",
        "tags: [gemstill, pruned]",
        "---",
        f"# {name}, pruned and not healed",
        "",
        f"Made by gemstill {sidecars.version()} from {name} (licence: {licence}; what it says of derived models holds "
        f"for this one): {figures['layers']} blocks, {figures['channels']} MLP channels in each, "
        f"{figures['parameters_without_embedding']:,} parameters without embedding "
        f"({figures['part_without_embedding']:.1%}). It needs training before it is of use.",
        "",
        f"Measured on {int(text.lengths.sum()):,} tokens of {text.source} (seed {config.seed}). "
        f"Loss in nats a token: whole {depth.base:.3f}, without the blocks left out {depth.loss:.3f}, without the "
        f"channels too {loss:.3f}.",
        "",
        "## Blocks",
        "",
        "Numbers are the source's. Influence: 1 − the mean cosine of the stream before and after. Alone: the rise of "
        "the loss without this block alone. Blocks went one at a time, that of least rise first.",
        "",
        *("| block | influence | alone | kept |", "| --- | --- | --- | --- |", *blocks),
        "",
        "## Channels",
        "",
        "The part of the summed squares of what the channels add to the stream that is kept, and which channels are "
        "kept: hexadecimal, the first channel the first digit's highest bit.",
        "",
        *("| block | kept part | channels |", "| --- | --- | --- |", *widths),
    ]
    return "\n".join(lines) + "\n"


def _bits(keep: Tensor, count: int) -> str:
    """A set of numbers below `count` in hexadecimal, the lowest number the first digit's highest bit."""
    width = -(-count // 4) * 4
    return f"{sum(1 << (width - 1 - number) for number in keep.tolist()):0{width // 4}x}"
