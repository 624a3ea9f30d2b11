"""A model's memory of one text, kept from prompt to prompt, so that only what is new is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.model.cache import Cache
from gemstill.model.readout import last_logits
from gemstill.model.transformer import Transformer

CHUNK = 512  # prompt tokens fed at once: bounds the memory of a long prompt
FIRST_CAPACITY = 512  # tokens that a new cache has room for; it doubles when it is full


def never() -> bool:
    """The answer to "has it been cancelled?" where nobody can."""
    return False


class Session:
    """One text after another through one cache.

    ids: the tokens whose keys and values are held. context: how many there may be. fed: how many tokens the
    last call of `feed` gave to the model.

    >>> session = Session(model)                      # doctest: +SKIP
    >>> logits = session.feed([2, 10, 11])            # doctest: +SKIP
    >>> logits = session.feed([2, 10, 11, 12, 13])    # two tokens are new  # doctest: +SKIP
    """

    def __init__(self, model: Transformer, *, context: int = 0) -> None:
        longest = model.config.max_position
        self.model = model
        self.context = min(context, longest) if context else longest
        self.ids: list[int] = []
        self.fed = 0
        self._cache: Cache | None = None

    def feed(self, ids: Sequence[int], cancelled: Callable[[], bool] = never) -> Tensor | None:
        """The logits [vocab] float32, on the CPU, of the token after `ids`, of which only the new ones are computed.

        What `ids` has in common with the text before stays, the rest is forgotten; where a local layer's
        ring has lost what that takes, all is computed anew. None when `cancelled` became true, which is
        asked before each CHUNK of tokens; what was computed until then is kept.

        Raises:
            Error: no tokens, or more than the context.
        """
        ids = list(ids)
        if not ids:
            raise Error("there are no tokens to feed", where="session")
        if len(ids) > self.context:
            what = f"{len(ids)} tokens exceed the context of {self.context}"
            raise Error(what, where="prompt", fix="shorten it")
        keep = min(_common(self.ids, ids), len(ids) - 1)  # the last token's logits are asked for
        cache = self._room(len(ids))
        if keep < len(self.ids):
            if not cache.rewind(keep):
                keep = 0
                cache.rewind(0)
            del self.ids[keep:]
        self.fed = 0
        logits: Tensor | None = None
        for start in range(keep, len(ids), CHUNK):
            if cancelled():
                return None
            logits = self._forward(cache, ids[start : start + CHUNK])
        return logits

    def reset(self) -> None:
        """Forget everything, and free the memory."""
        self.ids, self._cache = [], None

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return 0 if self._cache is None else self._cache.bytes

    def _room(self, tokens: int) -> Cache:
        if self._cache is None:
            capacity, device = min(self.context, max(tokens, FIRST_CAPACITY)), self.model.embed_tokens.weight.device
            dtype = self.model.compute_dtype or self.model.embed_tokens.weight.dtype
            self._cache = Cache(self.model.config, 1, capacity, dtype, device)
        elif tokens > self._cache.capacity:
            self._cache.grow(min(self.context, max(tokens, 2 * self._cache.capacity)))
        return self._cache

    @torch.inference_mode()
    def _forward(self, cache: Cache, ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids], device=self.model.embed_tokens.weight.device)
        try:
            logits: Tensor = self.model(tokens, cache=cache, readout=last_logits)
        except BaseException:
            self.reset()  # some layers have stored the tokens and others have not
            raise
        self.ids += ids
        self.fed += len(ids)
        return logits[0].float().cpu()


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    if a == b[: len(a)]:
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
