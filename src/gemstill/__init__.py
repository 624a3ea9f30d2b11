"""gemstill: make and run strong small language models.

The public names, each loaded when first used, so that `import gemstill` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemstill.checkpoint.source import load, save
    from gemstill.core.errors import Error
    from gemstill.distill.store import Store
    from gemstill.evaluation.run import evaluate
    from gemstill.infer.generate import generate, stream
    from gemstill.model.config import ModelConfig
    from gemstill.model.transformer import Transformer
    from gemstill.ops.loss import linear_cross_entropy, linear_jensen_shannon, linear_reverse_kl
    from gemstill.ops.target import OnlineTarget, Target
    from gemstill.text.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "Error": "core.errors",
    "ModelConfig": "model.config",
    "OnlineTarget": "ops.target",
    "Store": "distill.store",
    "Target": "ops.target",
    "Tokenizer": "text.tokenizer",
    "Transformer": "model.transformer",
    "evaluate": "evaluation.run",
    "generate": "infer.generate",
    "linear_cross_entropy": "ops.loss",
    "linear_jensen_shannon": "ops.loss",
    "linear_reverse_kl": "ops.loss",
    "load": "checkpoint.source",
    "save": "checkpoint.source",
    "stream": "infer.generate",
}

__all__ = [
    "Error",
    "ModelConfig",
    "OnlineTarget",
    "Store",
    "Target",
    "Tokenizer",
    "Transformer",
    "evaluate",
    "generate",
    "linear_cross_entropy",
    "linear_jensen_shannon",
    "linear_reverse_kl",
    "load",
    "save",
    "stream",
]


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in _HOMES:
        raise AttributeError(f"module 'gemstill' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"gemstill.{_HOMES[name]}"), name)
    globals()[name] = value  # found once, an ordinary attribute from then on
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
