"""lm-eval's requests, and its own backend over `transformers`, the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    """A request of a made-up task for each of `arguments`."""
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=("made-up", number, 1))
        for number, each in enumerate(arguments)
    ]


def hf(folder: Path, **options: Any) -> HFLM:
    """The `hf` backend on a folder, in float32 on the CPU, attention written out."""
    return HFLM(
        pretrained=str(folder),
        dtype="float32",
        device="cpu",
        attn_implementation="eager",
        **{"batch_size": 4} | options,
    )
