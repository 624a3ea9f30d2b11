"""The network that a run trains, ours or one of `transformers`: its shape, its beginning, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gemstill.data.rows import Text, entries_used
from gemstill.model.adapter import Adapter, ForeignConfig
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.train.config import ModelChoice, check_vocabulary

Network = Transformer | Adapter
Shape = ModelConfig | ForeignConfig


def shape_of(choice: ModelChoice, tokenizer: Tokenizer, texts: Sequence[Text]) -> Shape:
    """The shape of the network that a recipe names, for these texts of this tokenizer.

    Raises:
        Error: there is no such model, or its vocabulary is another, or it has no row for an entry that occurs.
    """
    if not (place := choice.start or choice.like):
        return choice.shape(tokenizer.vocab_size)
    from gemstill.checkpoint.foreign import is_foreign, make_foreign, place_of, shape_of

    if choice.like and is_foreign(place_of(place)):
        with torch.device("meta"):
            return make_foreign(place, tokenizer).config
    shape = shape_of(place)
    if choice.like and isinstance(shape, ModelConfig):
        return shape.with_vocab(tokenizer.vocab_size)
    entries = entries_used(shape.vocab_size, tokenizer.vocab_size, texts, place)
    check_vocabulary(shape.vocab_size, entries, place, any_padding=isinstance(shape, ForeignConfig))
    return shape


def begin(choice: ModelChoice, shape: Shape, tokenizer: Tokenizer, seed: int) -> Network:
    """The network with float32 weights, drawn from `seed` or opened. Raises Error as `shape_of` does."""
    if choice.start:
        from gemstill.checkpoint.foreign import open_any

        model = open_any(choice.start, dtype=torch.float32)[0]
        model.train()
        return model
    if isinstance(shape, ModelConfig):
        return Transformer(shape, seed=seed)
    from gemstill.checkpoint.foreign import make_foreign

    return make_foreign(choice.like, tokenizer, seed=seed)


def write(model: Network, weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Write a network with these whole weights, by their names in `model`, as a Hugging Face folder with its card.

    Raises:
        Error: as gemstill.save does.
    """
    if isinstance(model, Adapter):
        from gemstill.checkpoint.foreign import save_foreign

        save_foreign(model, weights, tokenizer, folder, card=card)
        return
    from gemstill.checkpoint.source import save

    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(weights, assign=True)
    save(whole, tokenizer, folder, card=card)
