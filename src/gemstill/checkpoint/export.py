"""`gemstill export SOURCE TARGET`: a model from any place into a format that others open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemstill.checkpoint.look import expect_model
from gemstill.core.errors import Error

BYTES = {
    "float32": 4.0, "f32": 4.0, "bfloat16": 2.0, "bf16": 2.0, "float16": 2.0, "f16": 2.0,
    "q8_0": 34 / 32, "q4_0": 18 / 32,
}  # fmt: skip  # of one weight


@dataclass(frozen=True)
class ExportConfig:
    """A model, and where to write it."""

    source: str  # a model: a folder, a .gguf file, Google's .ckpt file, a name on the hub
    target: Path  # a file ending in .gguf, or a Hugging Face folder
    dtype: str = ""  # of the stored weights: float32, bfloat16, float16; for .gguf also q8_0 and q4_0; empty keeps them
    card: str = ""  # a Markdown file that becomes the folder's model card; empty keeps the source's own

    def __post_init__(self) -> None:
        if self.dtype and self.dtype.lower() not in BYTES:
            raise Error(f"there is no dtype '{self.dtype}'", where="export", fix=f"take one of {', '.join(BYTES)}")


def run(config: ExportConfig) -> dict[str, Any]:
    """Read the source and write the target; what was written, in figures.

    Raises:
        Error: as gemstill.load and gemstill.save do.
    """
    expect_model(config.source)
    from gemstill.checkpoint.source import find, load, save
    from gemstill.model.quantized import count_weights

    path = find(config.source)
    model, tokenizer = load(path)
    save(model, tokenizer, config.target, dtype=config.dtype or None, card=_card(config, path))
    files = [config.target] if config.target.is_file() else sorted(config.target.iterdir())
    return {
        "parameters": count_weights(model),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def plan(config: ExportConfig) -> dict[str, Any]:
    """What `run` would write, in figures; the model is mapped, not read."""
    expect_model(config.source)
    from gemstill.checkpoint.source import load
    from gemstill.model.quantized import count_weights, weight_bytes

    model, _ = load(config.source)
    kept = weight_bytes(model)
    size = BYTES.get(config.dtype.lower(), 0) * count_weights(model)
    return {"parameters": count_weights(model), "weight_bytes": int(size or kept)}


def _card(config: ExportConfig, source: Path) -> str | None:
    """The card to write: the one named, or the source's, which tells where the weights come from and their licence."""
    path = Path(config.card) if config.card else source / "README.md"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if config.card:
            raise Error("cannot be read as a text", where=path, fix="name a Markdown file") from error
        return None
