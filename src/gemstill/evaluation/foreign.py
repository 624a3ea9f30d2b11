"""A model of `transformers` as lm-eval calls one: lm-eval's own `hf` backend (HFLM), with its log-likelihoods cheaper.

What a request means is that backend's to say: how a text becomes tokens, with BOS in front or without, as the model's
own tokenizer has it; the windows of a rolling perplexity; how texts are written, in batches padded on the left. Two
things are ours. Contexts to score become a trie whose branches are packed into rows, none padded: a beginning that
contexts share stands in a row once, and only positions that are asked for reach the head. And a chat template is
rendered in a process of its own, as that of every model here (gemstill.text.template).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemstill.checkpoint.foreign import library_tokenizer
from gemstill.core.errors import Error
from gemstill.evaluation.adapter import MAX_GEN_TOKS, Scored, room_for
from gemstill.evaluation.scoring import Row, Score, filled, gather
from gemstill.evaluation.tasks import quiet
from gemstill.evaluation.trie import Node, Text, grow
from gemstill.model.adapter import Adapter
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import render_with

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    fix = "pip install 'gemstill[eval,transformers]'"
    raise Error(f"models of other architectures need more packages ({error})", where="eval", fix=fix) from error

AT_ONCE = 8  # texts that are written together


class ForeignAdapter(Scored, HFLM):  # type: ignore[misc]
    """What lm-eval calls a model, of one that is `transformers`' own.

    context: tokens that a text may have, 0 for as many as the model is made for. batch_tokens: computed at once when
    texts are scored, 0 for a good number. truncated: texts so far that were longer than the context.

    Raises:
        Error: the tokenizer cannot be opened by `transformers`.
    """

    def __init__(self, model: Adapter, tokenizer: Tokenizer, *, context: int = 0, batch_tokens: int = 0) -> None:
        with quiet():
            super().__init__(
                model.eval().model,
                backend="causal",
                tokenizer=library_tokenizer(tokenizer),
                max_length=context or None,
                mixed_precision_dtype=model.compute_dtype,
                batch_size=AT_ONCE,
            )
        self.network, self.batch_tokens, self.truncated = model, batch_tokens, 0

    def reading(self) -> list[Any]:
        """As of any model, and how texts are begun and written here: the tokenizer's settings, and the generation's."""
        ids = self.tok_encode("It 's a , b .", add_special_tokens=False)
        written = self.model.generation_config.to_diff_dict()
        written.pop("transformers_version", None)
        return [
            *super().reading(),
            self.tok_batch_encode(["a"])[0].tolist(),
            self.tok_decode(ids),
            sorted(self.tokenizer.get_added_vocab().items()),
            sorted((name, repr(value)) for name, value in written.items()),
        ]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt. Raises Error for a model without a chat template, or one that refuses it."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str):
            fix = "take a model tuned for chat"
            raise Error("has no chat template, so it is not asked in turns", where=self.network.config.family, fix=fix)
        named = sorted(self.tokenizer.special_tokens_map.items())
        tokens = tuple((name, token) for name, token in named if isinstance(token, str))
        return render_with(template, tokens, chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context. Raises Error for max_gen_toks that leave the context no room."""
        for request in requests:
            context, options = request.args
            room = room_for(self.max_length, normalize_gen_kwargs(options, MAX_GEN_TOKS)["max_gen_toks"])
            self.truncated += len(self.tok_encode(context)) > room
        texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the context that share no predicted token."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def _score(self, texts: Sequence[Text]) -> Iterator[Score]:
        budget = self.batch_tokens or (1024 if self.network.head.device.type == "cpu" else 8192)
        rows = filled(list(_pieces(grow(texts).children, budget)), budget)
        return gather(texts, (self._read(Row.of(branches)) for branches in rows))

    @torch.inference_mode()
    def _read(self, row: Row) -> tuple[Row, Tensor, Tensor]:
        device = self.network.head.device
        tokens, positions, ends = (torch.from_numpy(x).to(device) for x in (row.tokens, row.positions, row.ends))
        # A text by itself needs no mask, which for a long one would be larger than all else.
        branches = None if bool((ends == len(tokens)).all()) else (positions[None], ends[None])
        return row, *self.network(tokens[None], branches=branches, readout=row.readout(device))


def _pieces(nodes: Sequence[Node], budget: int) -> Iterator[Node]:
    """The branches of a trie, those of more tokens than `budget` in several that begin alike, as far as that goes."""
    agenda = list(reversed(nodes))
    while agenda:
        node = agenda.pop()
        if node.size <= budget or not node.children:
            yield node
        else:
            agenda += reversed(node.divided(max(1, budget - len(node.tokens))))
