"""What lies at a source, told from names and first bytes alone: wrong input is answered before torch is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gemstill.checkpoint.hf_config import read_config
from gemstill.core.config import nearest
from gemstill.core.errors import Error

GGUF_MAGIC, ZIP_MAGIC, PICKLE_MAGIC = b"GGUF", b"PK\x03\x04", b"\x80"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = (".gguf", ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json")
# The first of these that a folder holds says what it is.
_FOLDERS = (
    ("config.json", "folder"),
    ("store.json", "store"),
    ("index.json", "dataset"),
    ("train/index.json", "datasets"),
    ("metrics.jsonl", "run"),
    ("recipe.json", "run"),
    ("steps.json", "run"),
    ("tokenizer.json", "tokenizer"),
    ("tokenizer.model", "tokenizer"),
)
NAMES = {
    "folder": "a model's folder",
    "gguf": "a GGUF file",
    "google": "a PyTorch file",
    "hub": "a name on the Hugging Face hub",
    "store": "a probability store",
    "dataset": "a data set of tokens",
    "datasets": "data sets of tokens",
    "run": "a run's folder",
    "tokenizer": "a tokenizer",
    "state": "a training state",
}


@dataclass(frozen=True)
class Found:
    """What a source is: a key of NAMES, and where it lies (for a hub name the name itself)."""

    kind: str
    path: Path


def look(source: str | Path) -> Found:
    """Tell what `source` is.

    Raises:
        Error: there is nothing, or nothing that gemstill knows.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return Found(_folder(path), path)
        if path.exists():
            return Found(_file(path), path)
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=source) from error
    # A name with a slash may be a path with a slip in it: then its first part is most often there.
    if _HUB.fullmatch(str(source)) and not str(source).endswith(_FILES) and not path.parent.is_dir():
        return Found("hub", Path(source))
    fix = "name a model's folder, a GGUF file or a hub name"
    if path.parent.is_dir():
        there = sorted(item.name for item in path.parent.iterdir())
        if (near := nearest(path.name, there)).startswith("did you mean"):
            fix = f"did you mean '{path.parent / near.split(chr(39))[1]}'?"
    raise Error("there is no such file or folder", where=source, fix=fix)


def expect_model(source: str | Path, *, any_architecture: bool = False) -> Found:
    """Tell what model `source` is, as far as that needs neither torch nor the network.

    any_architecture: networks that are not ours may be there too.

    Raises:
        Error: there is nothing; it is something else, which is named; another architecture.
    """
    found = look(source)
    if found.kind == "state":
        raise refuse_state(found.path)
    if found.kind not in ("folder", "gguf", "google", "hub"):
        fix = "name a model's folder, a GGUF file or a hub name"
        if (found.path / "model" / "config.json").exists():
            fix = f"its model is {found.path / 'model'}"
        raise Error(f"holds {NAMES[found.kind]}, not a model", where=source, fix=fix)
    if any_architecture:
        return found
    if found.kind == "folder":
        read_config(found.path)
    if found.kind == "gguf" and not (name := gguf_architecture(found.path)).startswith("gemma"):
        from gemstill.checkpoint.gguf_config import ARCHITECTURES

        fix = f"only {' and '.join(ARCHITECTURES)} can be opened"
        raise Error(f"holds a model of architecture {name!r:.60}", where=source, fix=fix)
    return found


def refuse_state(path: Path) -> Error:
    """The Error for a training state, which nothing but its own run may open."""
    fix = "name the run's folder, or the model/ in it"
    return Error("is a training state, which is read by pickle and so by its own run alone", where=path, fix=fix)


def gguf_architecture(path: Path) -> str:
    """The architecture of a GGUF file if that is its first field, as most writers have it, else "gemma"."""
    key = b"general.architecture"
    with path.open("rb") as handle:
        head = handle.read(256)
    start = 24 + 8 + len(key)  # magic, version, counts; the key's length; the key
    if head[32:start] != key or head[start : start + 4] != b"\x08\0\0\0":  # a text
        return "gemma"
    size = int.from_bytes(head[start + 4 : start + 12], "little")
    return head[start + 12 : start + 12 + size].decode(errors="replace") if size < 128 else "gemma"


def _folder(path: Path) -> str:
    if any((path / name).exists() for name in (".metadata", "record.json")) or any(path.glob("step-*/.metadata")):
        return "state"
    pickled = any(path.glob("*.ckpt")) or (path / "pytorch_model.bin.index.json").exists()
    if pickled and not any(path.glob("*.safetensors")):
        return "google"  # whatever the config.json that may lie beside them is about
    for name, kind in _FOLDERS:
        if (path / name).exists():
            return kind
    if inside := sorted(path.glob("*.gguf")):
        raise Error("is no model, but holds GGUF files", where=path, fix=f"name one of them: {inside[0]}")
    inside = sorted(path.glob("*/config.json"))
    fix = f"did you mean {inside[0].parent}?" if inside else "a model's folder has a config.json"
    what = "is empty" if not any(path.iterdir()) else "holds nothing that gemstill knows"
    raise Error(what, where=path, fix=fix)


def _file(path: Path) -> str:
    with path.open("rb") as handle:
        head = handle.read(4)
    if head == GGUF_MAGIC:
        return "gguf"
    if head == ZIP_MAGIC and path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return "google"
    fix = "name a model's folder, a GGUF file or a hub name"
    if path.suffix == ".safetensors" or (path.name == "config.json"):
        raise Error("is one file of a model", where=path, fix=f"name its folder: {path.parent}")
    if head[:1] == PICKLE_MAGIC:
        raise Error("is a pickle, which could run anything when opened", where=path, fix=fix)
    if path.suffix == ".gguf":
        raise Error("is no GGUF file, whatever its name says", where=path, fix="fetch it again")
    raise Error("is no model", where=path, fix=fix)
