"""Case number n of seed s: a good checkpoint, a part of it chosen, one to three mutations of that part."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from fuzz import gguf_file, raw, safetensors_file, sentencepiece_file, templates, tokenizer_file, torch_file, trees
from fuzz.seeds import Files, Seed

Mutator = Callable[[Random, bytes], bytes]
INDEX = "model.safetensors.index.json"
# What each kind of file has mutations of; the rest of a checkpoint's files are left as they are.
KINDS: dict[str, Sequence[Mutator]] = {
    "config.json": trees.MUTATORS,
    "tokenizer.json": tokenizer_file.MUTATORS,
    "tokenizer.model": sentencepiece_file.MUTATORS,
    "tokenizer_config.json": trees.MUTATORS,
    "generation_config.json": trees.MUTATORS,
    INDEX: trees.MUTATORS,
    ".safetensors": safetensors_file.MUTATORS,
    ".gguf": gguf_file.MUTATORS,
    ".ckpt": torch_file.MUTATORS,
}
# What a mutator may raise on bytes that another one has broken before it.
UNCHANGEABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError,
)  # fmt: skip
TEMPLATES = 0.05  # share of the cases that are templates: they may take all of the time they are allowed
SHARDS = (
    "../outside.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "..",
    "",
    ".",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "sub/../x",
    7,
)


@dataclass(frozen=True)
class Case:
    """One mutated checkpoint."""

    number: int
    seed: Seed
    story: str  # which mutations made it


def case(seeds: Sequence[Seed], seed: int, number: int) -> Case:
    """The case: a function of the good checkpoints, the seed and the number alone."""
    rng = Random(f"{seed}/{number}")
    return mutate(rng, rng.choice(seeds), number)


def mutate(rng: Random, start: Seed, number: int = 0) -> Case:
    """`start` with one part of it changed, or its folder."""
    files, told = dict(start.files), []
    parts = [name for name in files if kind(name)] or ["folder"]
    part = rng.choice([*parts, "folder"] if len(files) > 1 else parts)
    if rng.random() < TEMPLATES:
        part = "template"
    for turn in range(rng.choice((1, 1, 1, 2, 3))):
        if not files:
            break
        if part == "folder":
            told.append(_folder(rng, files))
        elif part == "template":
            told.append(_template(rng, files, start.source))
        elif part in files:
            mutators = raw.MUTATORS if rng.random() < 0.2 else KINDS[kind(part)]
            if part == INDEX and rng.random() < 0.4:
                mutators = [shard_names]
            chosen = rng.choice(mutators)
            told.append(chosen.__name__)
            try:
                files[part] = chosen(rng, files[part])
            except UNCHANGEABLE:
                if turn == 0 and files[part] == start.files[part]:  # only what is broken already may resist
                    told[-1] = f"flip_bits instead of {told[-1]}"
                files[part] = raw.flip_bits(rng, files[part])
    return Case(number, replace(start, files=files), f"{start.name}: {part}: {', '.join(told)}")


def kind(name: str) -> str:
    """The key of `KINDS` for a file, empty where there is none."""
    return next((kind for kind in KINDS if name == kind or (kind.startswith(".") and name.endswith(kind))), "")


def shard_names(rng: Random, data: bytes) -> bytes:
    """The index names files that lie elsewhere, or are none."""
    index = json.loads(data)
    wrong = rng.choice(SHARDS)
    names = list(index["weight_map"])
    for name in names if rng.random() < 0.3 else [rng.choice(names)]:
        index["weight_map"][name] = wrong
    return json.dumps(index).encode()


def _template(rng: Random, files: Files, source: str) -> str:
    """The chat template is hostile, in the GGUF file, in the settings or in a file of its own."""
    if source.endswith(".gguf"):
        files[source] = gguf_file.template(rng, files[source])
        return "template"
    text = templates.hostile(rng)
    if rng.random() < 0.3:
        files["chat_template.jinja"] = text.encode(errors="surrogatepass")
        return f"chat_template.jinja {text[:60]!r}"
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    settings["chat_template"] = rng.choice(templates.OTHER_TYPES) if rng.random() < 0.1 else text
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    return f"chat_template {settings['chat_template']!r:.60}"


def _folder(rng: Random, files: Files) -> str:
    """A file is missing, another's, or said by its name to be more."""
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    change = rng.randrange(4)
    if change == 0:
        del files[name]
        return f"without {name}"
    if change == 1:
        files[name] = files[other]
        return f"{name} is a copy of {other}"
    if change == 2:
        files[name.upper()] = files.pop(name)
        return f"{name} in capitals"
    files["pytorch_model.bin"] = files["model.pt"] = rng.choice(torch_file.PROGRAMS)
    files.pop(name, None)
    return f"pickles beside, without {name}"
