"""What a network's blocks and MLP channels are worth, measured on text: the choice of what pruning keeps."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.progress import Progress
from gemstill.data.calibration import Calibration
from gemstill.distill.layouts import Prunable

BATCH = 4096  # tokens run at once
SCORED = 1024  # next tokens that a loss is the mean of: a large head costs more than many blocks


@dataclass
class Depth:
    """Which blocks are kept, and why. Losses in nats a token, of the same tokens throughout."""

    kept: list[int]  # ascending
    base: float  # loss of the whole network
    loss: float  # loss with the kept blocks alone
    alone: list[float]  # rise of the loss when this block alone is left out
    influence: list[float]  # 1 − the mean cosine of the stream before and after the block
    dropped: list[tuple[int, float]] = field(default_factory=list)  # in order: block, loss after it was left out


class _Recall(nn.Module):
    """Stands for the first blocks of a network: gives the stream that they gave before."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.stream


@torch.no_grad()
def choose_blocks(
    net: Prunable, text: Calibration, kinds: Sequence[Hashable], wanted: Sequence[Hashable], *, seed: int = 0
) -> Depth:
    """Which len(wanted) blocks to keep: one at a time, the block goes whose absence raises the loss least.

    Rises are measured anew as blocks go, since blocks stand in for each other (arXiv 2402.02834 and 2407.14679
    rank by the loss once). A rise hardly ever falls when others go, so that one measured earlier is a lower bound
    and blocks are measured again only until the least fresh rise is below all earlier ones (lazy greedy, Minoux
    1978). Block influence (arXiv 2403.03853) is measured beside it.

    kinds: of the blocks. wanted: of the blocks that stay, in order: a block goes only if those left can still
    be of these kinds.
    """
    measure = _Measure(net, text, seed)
    count, gone = len(measure.blocks), len(measure.blocks) - len(wanted)
    try:
        with Progress(gone + 1, "rounds", "prune") as progress:
            base = measure.keep(list(range(count)))
            rises = {block: measure.without(block) - base for block in range(count)} if gone else {}
            depth = Depth(measure.kept, base, base, list(rises.values()), measure.influence())
            progress.advance(1, loss=base)
            while len(measure.kept) > len(wanted):
                if depth.dropped:
                    measure.keep(measure.kept)
                may = {b for b in measure.kept if fits([kinds[k] for k in measure.kept if k != b], wanted)}
                fresh: set[int] = set(measure.kept) if not depth.dropped else set()
                while (worst := min(may, key=lambda block: (rises[block], block))) not in fresh:
                    rises[worst] = measure.without(worst) - depth.loss
                    fresh.add(worst)
                depth.loss += rises[worst]
                depth.dropped.append((worst, depth.loss))
                measure.kept = depth.kept = [block for block in measure.kept if block != worst]
                progress.advance(1, loss=depth.loss)
    finally:
        net.blocks = nn.ModuleList(measure.blocks)
    return depth


def fits(kinds: Sequence[Hashable], wanted: Sequence[Hashable]) -> bool:
    """Whether `wanted` can be had from `kinds` by leaving some out.

    >>> fits("abab", "aab"), fits("abab", "bba")
    (True, False)
    """
    rest = iter(kinds)
    return all(any(kind == want for kind in rest) for want in wanted)


def scored(batches: Sequence[Calibration], seed: int) -> list[Tensor]:
    """For each batch [B, T] bool: which tokens' next tokens are scored, about SCORED in all, drawn once."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(int((batch.lengths - 1).sum()) for batch in batches)
    marks = []
    for batch in batches:
        has_next = torch.zeros_like(batch.real)
        has_next[:, :-1] = batch.real[:, 1:]
        marks.append(has_next & (torch.rand(has_next.shape, generator=generator) * total < SCORED))
    if not any(bool(mark.any()) for mark in marks):
        marks = [torch.zeros_like(mark) for mark in marks]
        marks[0][0, 0] = True
    return marks


class _Measure:
    """Losses of a network with some of its blocks, over the same tokens throughout."""

    def __init__(self, net: Prunable, text: Calibration, seed: int) -> None:
        self.net, self.blocks = net, list(net.blocks)
        self.batches = list(text.batches(BATCH))
        self.marks = scored(self.batches, seed)
        self.kept: list[int] = []
        self.streams: list[list[Tensor]] = []  # of each batch, before each kept block and after the last

    def keep(self, kept: list[int]) -> float:
        """Run with the kept blocks alone; gives the loss."""
        self.kept, self.streams = kept, []
        self.net.blocks = nn.ModuleList(self.blocks[k] for k in kept)
        total = 0.0
        for batch, mark in zip(self.batches, self.marks, strict=True):
            streams: list[Tensor] = []
            hooks = [
                *(b.register_forward_pre_hook(lambda _, x, to=streams: to.append(x[0])) for b in self.net.blocks),
                self.net.blocks[-1].register_forward_hook(lambda _, __, out, to=streams: to.append(out)),
            ]
            try:
                total += float(self.net.nll(batch.tokens, mark).double().sum())
            finally:
                for hook in hooks:
                    hook.remove()
            self.streams.append(streams)
        return total / self._scored

    def without(self, block: int) -> float:
        """The loss when one more block is left out; what comes before it is as it was and not run again."""
        place, total = self.kept.index(block), 0.0
        after = [self.blocks[k] for k in self.kept[place + 1 :]]
        for batch, mark, streams in zip(self.batches, self.marks, self.streams, strict=True):
            self.net.blocks = nn.ModuleList([_Recall(streams[place]), *after])
            total += float(self.net.nll(batch.tokens, mark).double().sum())
        return total / self._scored

    def influence(self) -> list[float]:
        """1 − the mean cosine of the stream before and after each kept block."""
        total, count = [0.0] * len(self.kept), 0
        for batch, streams in zip(self.batches, self.streams, strict=True):
            count += int(batch.lengths.sum())
            for place in range(len(self.kept)):
                before, after = (streams[place + step][batch.real].float() for step in (0, 1))
                total[place] += float((1 - torch.cosine_similarity(before, after, dim=-1)).double().sum())
        return [turn / count for turn in total]

    @property
    def _scored(self) -> int:
        return sum(int(mark.sum()) for mark in self.marks)


@torch.no_grad()
def loss_of(net: Prunable, text: Calibration, *, seed: int = 0) -> float:
    """The loss of a network, nats a token, over the tokens that `choose_blocks` takes."""
    measure = _Measure(net, text, seed)
    return measure.keep(list(range(len(measure.blocks))))


@torch.no_grad()
def channel_importance(net: Prunable, text: Calibration, kept: Sequence[int]) -> list[Tensor]:
    """For each kept block [M] float32: the root mean square of what each MLP channel adds to the residual stream.

    √(mean over tokens of a²) · the size of the channel's column: activation times weight (arXiv 2306.11695),
    from activations alone as in arXiv 2407.14679, measured with the kept blocks alone.
    """
    blocks = list(net.blocks)
    sums: list[Tensor | None] = [None] * len(kept)
    tokens = 0
    net.blocks = nn.ModuleList(blocks[k] for k in kept)
    try:
        for batch in text.batches(BATCH):
            real = batch.real

            def see(place: int, activations: Tensor, real: Tensor = real) -> None:
                squares = activations[real].double().square().sum(0)
                before = sums[place]
                sums[place] = squares if before is None else before + squares

            hooks = [net.watch(block, partial(see, place)) for place, block in enumerate(net.blocks)]
            try:
                mark = torch.zeros_like(real)
                mark[0, 0] = True
                net.nll(batch.tokens, mark)
            finally:
                for hook in hooks:
                    hook.remove()
            tokens += int(batch.lengths.sum())
    finally:
        net.blocks = nn.ModuleList(blocks)
    return [
        (square / tokens).sqrt().float() * net.columns(blocks[k])
        for k, square in zip(kept, sums, strict=True)
        if square is not None
    ]


def largest(importance: Tensor, count: int) -> Tensor:
    """The `count` channels of most importance, ascending; of equals the first."""
    order = importance.argsort(descending=True, stable=True)
    return order[:count].sort().values
