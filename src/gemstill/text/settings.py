"""What stands beside a tokenizer: settings for `transformers`, and the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import read_json
from gemstill.text.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary
from gemstill.text.words import SPACE

LONGEST_TEMPLATE, LARGEST_SETTINGS = 1 << 20, 16 << 20  # bytes


def read_chat_template(folder: Path) -> str | None:
    """The Jinja template of conversations in chat_template.jinja or, failing that, in tokenizer_config.json.

    Raises:
        Error: a file is damaged, or the template is longer than `LONGEST_TEMPLATE`.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > LONGEST_TEMPLATE:
            raise Error(f"is longer than {LONGEST_TEMPLATE} bytes", where=file)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Error(f"cannot be read ({error})", where=file) from error
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    if file.stat().st_size > LARGEST_SETTINGS:
        raise Error(f"is longer than {LARGEST_SETTINGS} bytes", where=file)
    found = read_json(file)
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):  # several by name, of which one is for plain conversations
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        return None
    if len(template) > LONGEST_TEMPLATE:
        raise Error(f"its chat template is longer than {LONGEST_TEMPLATE} characters", where=file)
    return template


def for_transformers(vocabulary: Vocabulary, chat_template: str | None) -> dict[str, Any]:
    """The contents of a tokenizer_config.json: `transformers` and llama.cpp's converter read it."""
    kinds = dict.fromkeys((CONTROL, UNKNOWN), True) | {USER_DEFINED: False}
    added: dict[str, dict[str, Any]] = {
        str(number): {
            "content": piece,
            "lstrip": False,
            "normalized": not kinds[kind] and SPACE in piece,  # a run of spaces is one once it is spelled so
            "rstrip": False,
            "single_word": False,
            "special": kinds[kind],
        }
        for number, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        if kind in kinds
    }
    ids = {name: getattr(vocabulary, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
    named = {name: vocabulary.pieces[number] for name, number in ids.items() if number >= 0}
    others = [each["content"] for each in added.values() if each["special"] and each["content"] not in named.values()]
    return {
        "tokenizer_class": "GemmaTokenizer",
        "added_tokens_decoder": added,
        **{f"{name}_token": piece for name, piece in named.items()},
        "mask_token": None,  # the class would otherwise append one to the vocabulary
        "additional_special_tokens": [token for token in others if "_of_turn" in token],
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "sp_model_kwargs": {},
        "model_max_length": 1000000000000000019884624838656,
        **({} if chat_template is None else {"chat_template": chat_template}),
    }
