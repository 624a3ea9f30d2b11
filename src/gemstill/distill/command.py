"""`gemstill store verify` and `gemstill store merge`: is a store whole, and one store of several parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.distill import code as id_code
from gemstill.distill.block import Block, block_path
from gemstill.distill.claims import Claims
from gemstill.distill.code import IdCode
from gemstill.distill.store import INDEX, Store, StoreInfo, write_index
from gemstill.distill.teach import finish, missing_blocks


@dataclass(frozen=True)
class VerifyConfig:
    """A store to be looked through."""

    store: Path  # the store's folder
    data: str = ""  # the data set it was made from, to find a store that is shifted against it


@dataclass(frozen=True)
class MergeConfig:
    """Parts of one store, written in several places."""

    parts: tuple[str, ...]  # folders of the parts: stores of one teacher, data set, estimator and seed
    target: Path  # the whole store; one begun there is added to

    def __post_init__(self) -> None:
        if not self.parts:
            raise Error("there is nothing to merge", where="store merge", fix="name the parts, then the target")


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Read all of a store, compare each file's SHA-256 and decode each row; with `data`, look for a shift.

    Raises:
        Error: naming the first damaged file, or the data set it is shifted against.
    """
    dataset = TokenDataset.open(config.data) if config.data else None
    store = Store.open(config.store, dataset)
    store.verify()
    figures = plan_verify(config)
    if dataset is not None:
        figures["probability_of_the_text"] = store.check_alignment(dataset)[1]
    return figures


def plan_verify(config: VerifyConfig) -> dict[str, Any]:
    """What `verify` will read."""
    store = Store.open(config.store)
    return {
        "blocks": store.info.num_blocks,
        "tokens": len(store),
        "bytes": round(store.bytes_per_token * len(store)),
        "bytes_per_token": store.bytes_per_token,
    }


def merge(config: MergeConfig) -> dict[str, Any]:
    """Copy the blocks of all parts into one store, each looked through first; finish it when all are there.

    Raises:
        Error: parts of different stores (the difference is named), a damaged block, one block with different
            bytes in two parts, a target that cannot be written or is another store.
    """
    parts, info = _parts(config.parts)
    with Claims(config.target) as claims, claims.store():
        _begin(config.target, parts[0], info)
        code = IdCode.read(config.target, info.vocab_size)
        for part in parts:
            for block in _blocks(part, info):
                Block(part, info, code, block).check()
                _copy(block_path(part, block), block_path(config.target, block))
        missing = missing_blocks(config.target, info)
        if not missing:
            finish(config.target, info)
    return _figures(info, missing)


def plan_merge(config: MergeConfig) -> dict[str, Any]:
    """What `merge` will find."""
    parts, info = _parts(config.parts)
    there = {block for part in parts for block in _blocks(part, info)}
    if (config.target / INDEX).exists():
        there |= set(_blocks(config.target, info))
    return _figures(info, [block for block in range(info.num_blocks) if block not in there])


def _figures(info: StoreInfo, missing: Sequence[int]) -> dict[str, Any]:
    shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
    return {"blocks": info.num_blocks, "missing_blocks": len(missing)} | ({"missing": shown} if missing else {})


def _blocks(folder: Path, info: StoreInfo) -> list[int]:
    gone = set(missing_blocks(folder, info))
    return [block for block in range(info.num_blocks) if block not in gone]


def _parts(folders: Sequence[str]) -> tuple[list[Path], StoreInfo]:
    """The parts and what all of them are made of."""
    paths = [Path(folder) for folder in folders]
    infos = [StoreInfo.parse(files.read_json(path / INDEX), path / INDEX) for path in paths]
    for path, info in zip(paths, infos, strict=True):
        _same(path, info, paths[0], infos[0])
    return paths, infos[0]


def _same(path: Path, info: StoreInfo, first: Path, other: StoreInfo) -> None:
    ours, theirs = asdict(info), asdict(other)
    different = [
        f"{name} is {ours[name]!s:.24}, there {theirs[name]!s:.24}" for name in ours if ours[name] != theirs[name]
    ]
    if not different and files.sha256(path / id_code.FILE) != files.sha256(first / id_code.FILE):
        different = [f"{id_code.FILE} has other bytes"]
    if different:
        what = f"is no part of the same store as {first}: {', '.join(different)}"
        raise Error(what, where=path, fix="merge parts of one store")


def _begin(target: Path, part: Path, info: StoreInfo) -> None:
    """Begin the store in `target` as in `part`, or see that it is the same."""
    if (target / INDEX).exists():
        _same(target, StoreInfo.parse(files.read_json(target / INDEX), target / INDEX), part, info)
        return
    strangers = [item.name for item in target.iterdir() if not item.name.startswith((".", INDEX, id_code.FILE))]
    if strangers:
        raise Error(f"holds other things ({strangers[0]})", where=target, fix="name a new folder")
    files.write(target / id_code.FILE, (part / id_code.FILE).read_bytes())
    write_index(target, info, None)


def _copy(source: Path, target: Path) -> None:
    data = source.read_bytes()
    if not target.exists():
        files.write(target, data)
    elif target.read_bytes() != data:
        what = f"has other bytes than {target}, for the same teacher, data and seed"
        raise Error(what, where=source, fix="find out which machine is wrong, and leave its part out")
