"""How near to the memory's own speed is a step of decoding, and what does a long context cost?

One text of the shape of `--model`, random weights in bfloat16, after a context of 100, 1,000 and 8,000 tokens: tokens
a second of the native step, keys and values in bfloat16 and in int8, weights in bfloat16, int8 and int4. The limit is
the bytes of the weights and of the keys and values that are seen, over the read bandwidth, which is measured in turn
with the steps. The peer, for bfloat16 weights, is the network's own PyTorch path over the same cache. `--rows 8`
decodes eight texts at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from common import Row, arguments, compare, finish
from gemstill.model.config import ModelConfig
from gemstill.model.readout import last_logits
from gemstill.model.slots import SlotCache
from gemstill.model.step import Step
from gemstill.model.transformer import Transformer
from gemstill.ops.native import loaded
from gemstill.ops.packed import Packed, pack

ROUNDS, STEPS = 5, 4
MEMORY = 256 << 20  # bytes that are summed for the bandwidth


def network(config: ModelConfig) -> Transformer:
    """Random weights in bfloat16; a pattern repeats, for drawing billions of numbers takes minutes."""
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=torch.bfloat16)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for weight in model.parameters():
        flat = weight.data.view(-1)
        pattern = torch.randn(min(flat.numel(), 1 << 20)) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1)
        for part in flat.split(1 << 20):
            part.copy_(pattern[: len(part)])
    return model.eval()


def quantize(model: Transformer, kind: str) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight
            del module.weight
            module.weight = pack(weight, kind)


def weight_bytes(model: Transformer) -> int:
    weights = [module.weight for module in model.modules() if hasattr(module, "weight")]
    return sum(w.nbytes if isinstance(w, Packed) else w.numel() * w.element_size() for w in weights)


def filled(config: ModelConfig, rows: int, context: int, dtype: torch.dtype) -> tuple[SlotCache, int]:
    """A cache of texts of `context` tokens with random contents, and the bytes of it that a step sees."""
    cache = SlotCache(config, rows, context + 1000, dtype)
    seen = 0
    for layer in cache.layers:
        for x in layer.tensors:
            x.random_(-99, 99) if x.dtype == torch.int8 else x.normal_(std=1.0 if x.dtype == dtype else 0.01)
            seen += min(context, layer.window) * rows * config.num_kv_heads * x.shape[-1] * x.element_size()
    for slot in range(rows):
        cache.advance(slot, context)
    return cache, seen


def seconds_of(works: list[Callable[[], object]]) -> list[list[float]]:
    """Median seconds of a call of each in every round, in turn."""
    found: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for times, work in zip(found, works, strict=True):
            took = []
            for _ in range(STEPS):
                start = time.perf_counter()
                work()
                took.append(time.perf_counter() - start)
            times.append(statistics.median(took))
    return found


def measure(name: str, model: Transformer, rows: int, context: int, cached: torch.dtype, with_peer: bool) -> Row:
    cache, seen = filled(model.config, rows, context, cached)
    step, slots = Step(model, cache), list(range(rows))
    tokens = torch.arange(5, 5 + rows)
    memory = torch.ones(MEMORY // 8, dtype=torch.int64)
    plain = [lambda: model(tokens[:, None], cache=cache.view(*slots), readout=last_logits)] if with_peer else []
    times = seconds_of([lambda: step(tokens.tolist(), slots), memory.max, *plain])
    ours, peer = ([rows / t for t in part] for part in (times[0], times[-1]))
    limit = rows * MEMORY / min(times[1]) / (weight_bytes(model) + seen)
    label = f"{name}, context {context:,}, keys and values {str(cached).removeprefix('torch.')}"
    return compare(label, ours, peer if with_peer else None, "tok/s", limit=limit)


@torch.inference_mode()
def main() -> None:
    args = arguments(__doc__, model="gemma3-270m", rows=1, weights="bfloat16,int8,int4", contexts="100,1000,8000")
    if not loaded():
        raise SystemExit("there are no native kernels here")
    found = []
    for kind in args.weights.split(","):
        model = network(ModelConfig.preset(args.model))
        if kind != "bfloat16":
            quantize(model, kind)
        for context in map(int, args.contexts.split(",")):
            for cached in (torch.bfloat16, torch.int8):
                with_peer = kind == "bfloat16" and cached == torch.bfloat16
                found.append(measure(f"{args.model} {kind}", model, args.rows, context, cached, with_peer))
    finish(found)


if __name__ == "__main__":
    main()
