"""One training step (forward, backward, fused AdamW) against transformers' Gemma 2 of the same configuration.

All run in one process, alternated, on the same tokens, with the same allocator settings and the same
optimizer. transformers runs eager and compiled, each in the fastest of float32, bfloat16 weights and
bfloat16 autocast, found by trial. The limit is the step's own matrix products, back to back, in our precision.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from common import Row, alternate, arguments, compare, finish, peak_bytes
from gemstill.checkpoint.hf_config import to_hf
from gemstill.core.allocator import keep_freed_memory
from gemstill.core.machine import fast_dtype
from gemstill.model.config import ModelConfig
from gemstill.model.readout import Loss
from gemstill.model.transformer import Transformer
from gemstill.ops.attention import make_mask
from gemstill.ops.native import loaded
from gemstill.ops.target import Target

TOKENS = 2048  # of one step
PRECISIONS = ("float32", "bfloat16", "autocast")
Step = Callable[[], float]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def ours(config: ModelConfig, tokens: Tensor, labels: Tensor) -> Step:
    compiled = not loaded()  # what training settles on: native kernels, or compiled blocks
    model = Transformer(config, compute_dtype=fast_dtype(tokens.device.type)).to(tokens.device).train()
    if compiled:
        model.compile_blocks()
    optimizer = adamw(model)

    def step() -> float:
        loss = model(tokens, readout=Loss(Target.hard(labels.flatten()), compiled=compiled)) / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(config: ModelConfig, tokens: Tensor, labels: Tensor, precision: str, *, compiled: bool) -> Step:
    raw = to_hf(config)
    raw.pop("dtype", None)
    shape = transformers.Gemma2Config(**raw, attn_implementation="eager", use_cache=False)
    model: Any = transformers.Gemma2ForCausalLM(shape).to(tokens.device).train()
    model = model.to(torch.bfloat16) if precision == "bfloat16" else model.float()
    optimizer = adamw(model)
    run = torch.compile(model) if compiled else model
    device = tokens.device.type

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            # shift_labels: the labels are the next tokens already, as ours are.
            loss = run(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def products(config: ModelConfig, batch: int, window: int, device: str) -> Callable[[], object]:
    """The matrix products of one step, forward and backward, and nothing else."""
    dtype = fast_dtype(device)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    D, H, G, d, N = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, batch * window
    widths = [(D, (H + 2 * G) * d), (H * d, D), (D, 2 * config.intermediate_size), (config.intermediate_size, D)]
    linear = [(new(N, i), new(o, i), new(N, o)) for i, o in widths] * config.num_layers
    linear.append((new(N, D), new(config.vocab_size, D), new(N, config.vocab_size)))
    places = torch.arange(window, device=device)[None].expand(batch, -1)
    zeros = torch.zeros_like(places)
    attention = []
    for layer in range(config.num_layers):
        seen = config.sliding_window if config.is_local(layer) else None
        mask = make_mask(places, places, zeros, zeros, seen, ordered=True)
        stacks = batch * G * (-(-window // mask.band) if mask.band else 1)
        for start, stop, first, last in mask.tiles:
            rows, keys = (stop - start) * H // G, last - first
            attention.append((new(stacks, rows, d), new(stacks, keys, d), new(stacks, rows, keys)))

    def run() -> None:
        for x, w, g in linear:
            F.linear(x, w)
            g @ w
            g.T @ x
        for q, k, s in attention:
            for _ in range(2):  # scores and values forward; their gradients to scores backward
                q @ k.mT
                s @ k
            s.mT @ q
            s.mT @ q

    return run


def rate(step: Callable[[], object], device: str, at_least: float = 2.0) -> float:
    """Tokens a second over about `at_least` seconds of steps."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < at_least:
        step()
        count += 1
    if device != "cpu":
        torch.cuda.synchronize()
    return TOKENS * count / (time.perf_counter() - start)


def fastest(config: ModelConfig, tokens: Tensor, labels: Tensor) -> str:
    """The precision in which eager transformers trains fastest here."""
    found = {}
    for precision in PRECISIONS:
        step = theirs(config, tokens, labels, precision, compiled=False)
        step()
        found[precision] = rate(step, tokens.device.type, 1.0)
    return max(found, key=lambda name: found[name])


MEMORY = """
import sys; sys.path.insert(0, {folder!r})
from train_step import *
keep_freed_memory()
config = ModelConfig.preset({preset!r})
tokens = torch.randint(0, config.vocab_size, ({batch}, {window}))
step = {call}
for _ in range(3): step()
"""


def memory(preset: str, batch: int, window: int, call: str) -> int:
    """Peak bytes of three steps in a process of their own, above what the imports take."""
    folder = __file__.rpartition("/")[0]
    code = MEMORY.format(folder=folder, preset=preset, batch=batch, window=window, call=call)
    return peak_bytes(code, f"import sys; sys.path.insert(0, {folder!r})\nfrom train_step import *")


def measure(preset: str, window: int, device: str, compiled_peer: bool, rounds: int) -> list[Row]:
    config = ModelConfig.preset(preset)
    batch = TOKENS // window
    tokens = torch.randint(0, config.vocab_size, (batch, window), device=device)
    labels = tokens.roll(-1, 1)
    precision = fastest(config, tokens, labels)
    steps: dict[str, Callable[[], object]] = {"ours": ours(config, tokens, labels)}
    steps["eager"] = theirs(config, tokens, labels, precision, compiled=False)
    if compiled_peer:
        steps["compiled"] = theirs(config, tokens, labels, precision, compiled=True)
    steps["limit"] = products(config, batch, window, device)
    for step in steps.values():
        step()  # compilation, before anything is timed
    jobs = {name: (lambda step=step: rate(step, device)) for name, step in steps.items()}
    found = alternate(jobs, rounds=rounds)
    limit = sorted(found["limit"])[rounds // 2]
    name = f"{preset}, {batch} x {window}"
    rows = [compare(f"{name}: eager {precision}", found["ours"], found["eager"], "tokens/s", bar=2.0, limit=limit)]
    if compiled_peer:
        label = f"{name}: compiled {precision}"
        rows.append(compare(label, found["ours"], found["compiled"], "tokens/s", bar=1.25, limit=limit))
    print(*rows, sep="\n", flush=True)
    if device == "cpu":
        mine = memory(preset, batch, window, "ours(config, tokens, tokens)")
        peer = memory(preset, batch, window, f"theirs(config, tokens, tokens, {precision!r}, compiled=False)")
        unit = "peak bytes above imports"
        rows.append(compare(f"{name}: memory, eager {precision}", [mine], [peer], unit, bar=0.7, small=True))
    return rows


def main() -> None:
    options = arguments(__doc__, only="", rounds=5)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows: list[Row] = []
    for preset in ("mini-1m", "mini-5m", "mini-15m"):
        for window in (256, 1024):
            if options.only in f"{preset}/{window}":
                # Compiling the peer takes minutes a configuration: one window each, both with --full.
                peer = options.full or window == 256 or bool(options.only)
                rows += measure(preset, window, options.device, peer, options.rounds)
    finish(rows, tokens_per_step=TOKENS, optimizer="torch AdamW, fused")


if __name__ == "__main__":
    main()
