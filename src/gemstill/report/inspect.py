"""`gemstill inspect`: what is in a model, a store, a data set or a run. Weights are described, never read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemstill.checkpoint.look import NAMES, expect_model, look, refuse_state
from gemstill.core.errors import Error
from gemstill.core.files import read_json
from gemstill.core.terminal import printable

MODELS = ("folder", "gguf", "google", "hub")


@dataclass(frozen=True)
class InspectConfig:
    """What `gemstill inspect` needs to know."""

    source: str  # a model (folder, GGUF file, hub name), a probability store, a data set, a run, a tokenizer
    json: bool = False  # print one JSON object


def run(config: InspectConfig) -> None:
    """Print what is at `config.source`. Raises Error as `describe` does."""
    found = describe(config.source)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        from gemstill.report.inspect_text import text

        print(printable(text(found)))


def plan(config: InspectConfig) -> dict[str, Any]:
    """What would be inspected, told from names alone."""
    found = look(config.source)
    return {"source": config.source, "kind": NAMES[found.kind]}


def describe(source: str | Path) -> dict[str, Any]:
    """What is at `source`, as plain values: "source", "kind", and by kind what README and docs/generate.md say.

    Raises:
        Error: there is nothing or nothing known; another architecture; a training state, which is a pickle; a
            file so damaged that it cannot be described.
    """
    found = look(source)
    if found.kind == "state":
        raise refuse_state(found.path)
    if found.kind in MODELS:
        expect_model(source)
        from gemstill.report.inspect_model import describe_model

        described = describe_model(found)
    else:
        described = _DESCRIBERS[found.kind](found.path)
    return {"source": str(source), "kind": NAMES[found.kind], **described}


def _store(path: Path) -> dict[str, Any]:
    from gemstill.distill.block import block_path
    from gemstill.distill.store import INDEX, StoreInfo

    record = read_json(path / INDEX)
    info = StoreInfo.parse(record, path / INDEX)
    blocks = [block_path(path, number) for number in range(info.num_blocks)]
    there = [block for block in blocks if block.is_file()]
    size = sum(block.stat().st_size for block in there)
    unusual = []
    if not record.get("complete"):
        unusual.append(
            f"it is not finished: {len(there)} of {len(blocks)} blocks are there; teach again and it goes on"
        )
    elif len(there) < len(blocks):
        unusual.append(f"{len(blocks) - len(there)} of {len(blocks)} blocks are missing")
    if info.estimator.startswith("topk"):
        unusual.append("its estimator is biased: what is outside of the k likeliest is missing")
    tokens = min(info.num_tokens, len(there) * info.block_tokens)
    described = {name: value for name, value in asdict(info).items() if name not in ("format", "version")}
    described |= {"complete": bool(record.get("complete")), "blocks": len(there), "bytes": size}
    described |= {"bytes_per_token": round(size / max(1, tokens), 2)}
    return {"store": described | _entries(there[:1], min(info.num_tokens, info.block_tokens)), "unusual": unusual}


def _entries(blocks: list[Path], rows: int) -> dict[str, float]:
    """The mean number of entries of a row in the first block, with a weight of their own and without."""
    from safetensors import SafetensorError, safe_open

    for block in blocks:
        try:
            with safe_open(block, framework="np") as handle:
                entries, weighted, _ = handle.get_tensor("index")[-1].tolist()
        except (OSError, SafetensorError, ValueError, IndexError) as error:
            raise Error(f"cannot be read ({error})", where=block, fix="fetch or make this block again") from error
        return {
            "weighted_entries_per_row": round(weighted / rows, 2),
            "sharing_entries_per_row": round((entries - weighted) / rows, 2),
        }
    return {}


def _dataset(path: Path) -> dict[str, Any]:
    from gemstill.data.dataset import INDEX, TokenDataset

    dataset = TokenDataset.open(path)
    index = dataset.index
    stated = index.get("source")
    sources = [str(each.get("name")) for each in stated if isinstance(each, dict)] if isinstance(stated, list) else []
    shards = [path / shard["file"] for shard in index["shards"]]
    described = {
        "split": index.get("split"),
        "tokens": dataset.num_tokens,
        "documents": dataset.num_documents,
        "text_bytes": dataset.bytes,
        "text_bytes_per_token": round(dataset.bytes / dataset.num_tokens, 3),
        "tokens_per_document": round(dataset.num_tokens / dataset.num_documents, 1),
        "vocab_size": dataset.vocab_size,
        "bos_id": dataset.bos_id,
        "eos_id": dataset.eos_id,
        "sources": sources,
        "skipped": index.get("skipped"),
        "shards": len(shards),
        "bytes": sum(shard.stat().st_size for shard in shards),
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "fingerprint": dataset.fingerprint,
    }
    named = {shard.name for shard in shards} | {INDEX}
    extra = sorted(item.name for item in path.glob("*.safetensors") if item.name not in named)
    unusual = [f"files that the index does not name: {', '.join(extra[:8])}"] if extra else []
    return {"dataset": described, "unusual": unusual}


def _datasets(path: Path) -> dict[str, Any]:
    parts = {name: _dataset(path / name) for name in ("train", "heldout") if (path / name / "index.json").is_file()}
    unusual = [f"{name}: {what}" for name, part in parts.items() for what in part["unusual"]]
    return {"datasets": {name: part["dataset"] for name, part in parts.items()}, "unusual": unusual}


def _run(path: Path) -> dict[str, Any]:
    described: dict[str, Any] = {}
    unusual = []
    steps = _last_step(path / "metrics.jsonl")
    if (path / "summary.json").is_file():
        described["summary"] = read_json(path / "summary.json")
    else:
        unusual.append(f"the run is not finished: {steps or 0:,} steps are done; the same command goes on")
    states = sorted(item.name for item in (path / "state").glob("step-*") if item.name[5:].isdigit())
    described |= {"steps": steps, "states": states}
    parts = {}
    for item in sorted(path.iterdir()):
        if item.is_dir() and item.name not in ("state", "tensorboard"):
            try:
                parts[item.name] = NAMES[look(item).kind]
            except Error:
                continue
    return {"run": described | {"holds": parts}, "unusual": unusual}


def _last_step(path: Path) -> int | None:
    """The last step in a metrics.jsonl, whose last line may be cut off."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def _tokenizer(path: Path) -> dict[str, Any]:
    from gemstill.report.inspect_model import describe_tokenizer
    from gemstill.text.tokenizer import Tokenizer

    tokenizer, template, unusual = describe_tokenizer(Tokenizer.open(path))
    return {"tokenizer": tokenizer, "template": template, "unusual": unusual}


_DESCRIBERS = {"store": _store, "dataset": _dataset, "datasets": _datasets, "run": _run, "tokenizer": _tokenizer}
