"""The next tokens of a few texts in shapes that stay the same, so that a GPU can play a recorded step again.

A step of a small model is some thousand kernels of microseconds each, and to launch them one by one from Python takes
longer than they do. A CUDA graph launches all at once, but it plays back what was recorded: the same kernels on the
same memory. So nothing here depends on a number that the processor would have to ask for: lengths, positions and which
slots have a token are tensors, keys are written by index, and what is not seen is masked.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.model.readout import last_logits
from gemstill.model.slots import SlotCache, SlotView, reach
from gemstill.model.transformer import Transformer

SIZES = (1, 2, 4, 8, 16)  # slots of a step


class Shape(NamedTuple):
    """The first `slots` slots, and as many indices of each as `keys`."""

    slots: int
    keys: int


class StillView(SlotView):
    """The first slots of a cache as Transformer.forward takes them, at positions that it is given.

    Slots that `live` leaves out keep what they have, and no tokens are counted as held: both are the caller's.
    """

    def __init__(self, cache: SlotCache, shape: Shape) -> None:
        super().__init__(cache, range(shape.slots))
        self.keys = shape.keys

    @property
    def length(self) -> int:
        return self.keys - 1  # as if the longest text were as long as can be

    def advance(self, documents: Tensor) -> None:
        self._masks = {}


class StaticStep:
    """Steps of `model` over the texts of a cache that is read in steps (SlotCache.stepped), one token of a text each.

    Computed are the first 1, 2, 4, 8 or 16 slots, up to the last that has a token; those between keep what they have.
    On CUDA each shape is recorded when it first comes, and again when weights or the cache have moved in memory;
    weights that change where they are, as in training, are followed. It is torch.cuda.CUDAGraph over the plain
    operations and not torch.compile's "reduce-overhead": nothing has to be compiled for each shape, a cache that is
    written in place is no obstacle, and when to record anew is decided here. Where recording fails, one line says so,
    and the same steps go one operation at a time.

    >>> step = StaticStep(model, cache)                      # doctest: +SKIP
    >>> rows = step([12, 97], slots=[0, 2])                  # the next token of two texts  # doctest: +SKIP
    """

    def __init__(self, model: Transformer, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        self._holders = [module._parameters for module in model.modules() if "weight" in module._parameters]
        self._known: list[Any] = []
        self._recording = cache.device.type == "cuda"
        self._recorded: dict[Shape, _Recorded] = {}
        make: Any = torch.cuda.Stream
        self._stream: Any = make(cache.device) if self._recording else None
        self._pool: Any = None  # the memory that all recordings share, for one plays at a time

    def __call__(self, tokens: Sequence[int], slots: Sequence[int]) -> list[Tensor] | None:
        """Feed token tokens[i] to the text in slots[i], and count it as held. No slot is named twice.

        Returns logits [V] float32 for each on the CPU, good until the next call; None, and nothing is done, where
        weights are no ordinary tensors, the cache is not read in steps, or a slot is none of the first 16. Then
        Transformer.forward on cache.view(…) is the way.

        Raises:
            Error: a slot would hold more tokens than its capacity.
        """
        cache = self.cache
        if not (cache.stepped and slots and max(slots) < SIZES[-1] and self._look()):
            return None
        longest = max(cache.lengths[slot] for slot in slots) + 1
        if longest > cache.capacity:
            raise Error(f"{longest} tokens do not fit a cache of {cache.capacity}", where="model")
        count = next(size for size in SIZES if size > max(slots))
        shape = Shape(min(count, cache.slots), reach(longest, cache.capacity, True))
        rows = torch.zeros(3, shape.slots, dtype=torch.int64)
        for token, slot in zip(tokens, slots, strict=True):
            rows[:, slot] = torch.tensor([token, cache.lengths[slot], 1])
        logits = self._play(shape, rows)
        for slot in slots:
            cache.advance(slot, 1)
        return [logits[slot] for slot in slots]

    def _look(self) -> bool:
        """Forget what was recorded if weights or cache are elsewhere now; False where a weight is not ordinary."""
        weights: list[Any] = [parameters["weight"] for parameters in self._holders]
        if not all(type(weight) in (Tensor, Parameter) for weight in weights):
            return False
        memory = [x for layer in self.cache.layers for x in layer.tensors]
        known = [self.cache.slots, self.cache.capacity, self.model.compute_dtype]
        known += [x.data_ptr() for x in weights + memory] if self._recording else []
        if len(known) != len(self._known) or not all(map(operator.eq, known, self._known)):
            self._known, self._recorded = known, {}
            # A pool whose recordings are gone is not to be used again.
            self._pool = torch.cuda.graph_pool_handle() if self._recording else None
        return True

    def _compute(self, view: StillView, rows: Tensor) -> Tensor:
        """Logits [n, V] float32 of rows [3, n] int64: token, position and whether there is one, of each slot."""
        view.live = rows[2] > 0
        out: Tensor = self.model(rows[0, :, None], positions=rows[1, :, None], cache=view, readout=last_logits)
        return out.float()

    @torch.inference_mode()
    def _play(self, shape: Shape, rows: Tensor) -> Tensor:
        device = self.cache.device
        if self._recording:
            with torch.cuda.device(device):
                if shape not in self._recorded:
                    self._record(shape)
                if (found := self._recorded.get(shape)) is not None:
                    found.rows.copy_(rows)
                    found.graph.replay()
                    return found.host.copy_(found.logits)  # waits for the GPU
        return self._compute(StillView(self.cache, shape), rows.to(device)).cpu()

    def _record(self, shape: Shape) -> None:
        view, stream = StillView(self.cache, shape), self._stream
        rows = torch.zeros(3, shape.slots, dtype=torch.int64, device=self.cache.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # First without a recording, for what libraries set up when first used on a stream; no slot has a token.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._compute(view, rows)
            # Another thread may use the GPU meanwhile, as a loader does.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._compute(view, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._recording, self._recorded = False, {}
            what = " ".join(str(error).split())[:200]
            note(f"steps are not recorded as a CUDA graph, and take longer: {what}", where="engine")
            return
        self._recorded[shape] = _Recorded(graph, rows, logits, torch.empty(logits.shape, pin_memory=True))


class _Recorded(NamedTuple):
    graph: Any
    rows: Tensor  # what it reads
    logits: Tensor  # what it writes
    host: Tensor  # the same on the CPU, in memory that the GPU writes at full speed
