"""The small files of a Hugging Face folder: settings of the tokenizer and of generation, model card."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from gemstill.core.files import write_json
from gemstill.model.config import ModelConfig
from gemstill.text.tokenizer import Tokenizer

END_OF_TURN = "<end_of_turn>"


def version() -> str:
    """The installed version of gemstill."""
    try:
        return metadata.version("gemstill")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that `config.json` names."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`generation_config.json`: generation also ends with a turn, where there are turns."""
    turn = tokenizer.token_id(END_OF_TURN)
    eos = tokenizer.eos_id if turn is None else [tokenizer.eos_id, turn]
    return {**special_ids(tokenizer), "eos_token_id": eos, "do_sample": False}


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's files; settings for `transformers` are made up for a tokenizer.json that came without them."""
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    if path.exists():
        return
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    settings: dict[str, Any] = {f"{name}_token": tokenizer.decode([number]) for name, number in names.items()}
    # This class takes tokenizer.json as it is, whatever family it is of.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(path, settings)


def licence(folder: Path) -> str:
    """The `license:` line in the header of a folder's model card, or "unknown"."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return "unknown"
    if lines[:1] == ["---"]:
        for line in lines[1:]:
            if line == "---":
                break
            if line.startswith("license:"):
                return line.removeprefix("license:").strip().strip("'\"") or "unknown"
    return "unknown"


def default_card(config: ModelConfig) -> str:
    """A model card that says what can be read off the network itself."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gemstill]
---
# A {config.family} language model

{config.num_layers} layers, width {config.hidden_size}, vocabulary {config.vocab_size:,},
context {config.max_position:,} tokens; {config.body_parameters:,} parameters and {config.embedding_parameters:,}
of embedding. Written by gemstill {version()}.
"""
