"""The next tokens of a few texts in one native call, with no Python between the layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gemstill.core.errors import Error
from gemstill.model.slots import SPARE, SlotCache
from gemstill.model.transformer import Transformer
from gemstill.ops.native import DTYPES, kernels
from gemstill.ops.packed import FEW, Packed, Weight

assert FEW <= SPARE  # all rows of a text are stored before the first of them looks
PLAIN = -1  # the kind of a weight that is a tensor: its dtype says the rest
_CACHED = {*DTYPES, torch.int8}
_BLOCK = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
    "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp.gate_proj",
    "mlp.up_proj", "mlp.down_proj", "post_feedforward_layernorm",
)  # fmt: skip


class Step:
    """Steps of `model` over the texts of `cache`, a few tokens at a time.

    Weights are read where they lie, anew in each step, so a model in training or replaced parameters are followed.
    Activations are float32, whatever the model's compute dtype, but those of tokens that need not be exact: the answer
    is that of the float32 network with the stored weights, up to rounding (float32's, and that of keys and values to
    the cache's dtype). Only the embedding's scale is rounded to the compute dtype, as in Transformer.forward.

    >>> step = Step(model, cache)                        # doctest: +SKIP
    >>> logits = step([12, 97, 4], slots=[0, 2, 3])      # the next token of three texts  # doctest: +SKIP
    """

    def __init__(self, model: Transformer, cache: SlotCache) -> None:
        self.model, self.cache = model, cache
        config = model.config
        self._windows = [config.sliding_window if config.is_local(n) else 0 for n in range(config.num_layers)]
        self._shape = [
            config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.vocab_size, config.num_layers, int(config.qk_norm), int(not config.tie_embeddings),
        ]  # fmt: skip
        thetas = (config.rope_theta, config.rope_local_theta or config.rope_theta)
        even = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._frequencies = torch.stack([theta**-even for theta in thetas])
        modules = [model.embed_tokens, *(part for layer in model.layers for part in _parts(layer)), model.norm]
        self._modules = modules if model.lm_head is None else [*modules, model.lm_head]
        # The threads of a step wait for one another, so all must run at once, which only OpenMP's are sure to do.
        self._together = "backend: OpenMP" in torch.__config__.parallel_info()
        self._known: list[Any] = []  # the weights of the last step
        self._places: list[dict[str, Any]] = []  # where they were found
        self._as: tuple[int, torch.dtype] | None = None  # the cache's shape and the compute dtype of the last step
        self._network: Tensor | None = None  # all of that, as the native step takes it

    def __call__(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int] | None = None,
        exact: int | None = None,
    ) -> Tensor | None:
        """Feed token tokens[i] to the text in slots[i], and count it as held.

        A slot that is named several times takes these tokens one after the other. wanted: which of the tokens' logits
        are asked for, all by default. exact: how many tokens, the first ones, need float32 activations, all by default;
        what weights of layers in bfloat16 are multiplied with is rounded to it for the others, if it is the compute
        dtype and the processor has an instruction for such products. Transformer.forward rounds more than that.

        Returns logits [len(wanted), V] float32; None, and nothing is done, where this cannot be computed natively:
        more than 64 tokens, no kernels, another device, weights or a cache of another dtype than float32 and
        bfloat16 or packed ones. Then Transformer.forward on cache.view(…) is the way.

        Raises:
            Error: a slot would hold more tokens than its capacity.
            RuntimeError: a token outside the vocabulary.
        """
        cache = self.cache
        sound = self._together and 0 < len(tokens) <= FEW and cache.dtype in _CACHED
        if not sound or kernels(self._frequencies) is None:
            return None
        ends: dict[int, int] = {}
        positions = []
        for slot in slots:
            positions.append(ends.get(slot, cache.lengths[slot]))
            ends[slot] = positions[-1] + 1
        if max(ends.values()) > cache.capacity:
            raise Error(f"{max(ends.values())} tokens do not fit a cache of {cache.capacity}", where="model")
        asked = list(range(len(tokens)) if wanted is None else wanted)
        with torch.no_grad():
            network = self._look()
            if network is None or self._as is None:
                return None
            logits = torch.empty(len(asked), self.model.config.vocab_size)
            first = len(tokens) if exact is None or self._as[1] != torch.bfloat16 else exact
            if not torch.ops.gemstill.step(network, list(tokens), list(slots), positions, asked, first, logits):
                return None
        for slot, end in ends.items():
            cache.advance(slot, end - cache.lengths[slot])
        return logits

    def _look(self) -> Tensor | None:
        """The network as it is now, for the native step; None where a weight is no tensor of the ordinary kind."""
        # Once a token this is to cost little, and between two of them all that it looks at has left the caches.
        found = list(map(dict.get, self._places, repeat("weight")))
        same = bool(found) and all(map(operator.is_, found, self._known))
        if not same or self._as != (self.cache.shaped, self._dtype(self._known[0])):
            self._prepare()
        return self._network

    def _prepare(self) -> None:
        weights = self._known = [module.weight for module in self._modules]
        own = [module._parameters for module in self._modules]
        self._places = [
            place if place.get("weight") is not None else module.__dict__
            for place, module in zip(own, self._modules, strict=True)
        ]
        tensors = [weight.data if isinstance(weight, Packed) else weight for weight in weights]
        kinds = [weight.order.number if isinstance(weight, Packed) else PLAIN for weight in weights]
        dtype = self._dtype(weights[0])
        self._as, self._network = (self.cache.shaped, dtype), None
        if all(type(x) in (Tensor, Parameter) for x in tensors):
            memory = [x for layer in self.cache.layers for x in layer.tensors]
            self._network = torch.ops.gemstill.step_network(
                tensors, kinds, memory, self._windows, self._frequencies, self._shape, self._constants(dtype)
            )

    def _dtype(self, embedding: Weight) -> torch.dtype:
        return self.model.compute_dtype or (torch.float32 if isinstance(embedding, Packed) else embedding.dtype)

    def _constants(self, dtype: torch.dtype) -> list[float]:
        config = self.model.config
        scale = float(torch.tensor(math.sqrt(config.hidden_size), dtype=dtype))
        caps = (config.attn_logit_softcap or 0.0, config.final_logit_softcap or 0.0)
        return [config.rms_norm_eps, scale, config.query_pre_attn_scalar**-0.5, *caps]


def _parts(layer: torch.nn.Module) -> list[Any]:
    """The modules of a block that have weights, in the order in which native/step.cpp reads them."""
    named = dict(layer.named_modules())
    return [named[name] for name in _BLOCK if name in named]
