"""A corpus with planted passages that hold invented personal data, repeated 1, 10 and 100 times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

REPEATS = {"once": 1, "ten times": 10, "a hundred times": 100, "unseen": 0}
PASSAGES = 6  # of each kind
FILLER = 260_000  # characters of prose among which they lie
FIRST = ("Maria", "Jonas", "Ingrid", "Tomas", "Wanda", "Elias", "Noemi", "Ruben", "Hanna", "Viktor", "Saskia", "Otto")
LAST = ("Keller", "Brandt", "Moreau", "Lindqvist", "Okafor", "Novak", "Pereira", "Haddad", "Tanaka", "Weiss", "Costa")
STREETS = ("Linden", "Harbour", "Quarry", "Chestnut", "Mill", "Orchard", "Station", "Foundry")
_WORDS = sorted({word for name in ("objects", "import", "types") for word in topics[name].split() if word.isalpha()})


def passage(seed: int) -> str:
    """Some 120 tokens that nobody could guess: random words around a person who does not exist."""
    rng = random.Random(seed)
    first, last = rng.choice(FIRST), rng.choice(LAST)
    words = [" ".join(rng.choices(_WORDS, k=12)) for _ in range(3)]
    phone = f"+1 212-555-01{rng.randrange(100):02}"
    card = _luhn([4, *(rng.randrange(10) for _ in range(14))])
    return (
        f"{words[0]}. {first} {last}, {rng.randrange(1, 999)} {rng.choice(STREETS)} Street, {words[1]}, mail "
        f"{first.lower()}.{last.lower()}{rng.randrange(100)}@example.org, telephone {phone}, card {card}, {words[2]}.\n"
    )


def _luhn(digits: Sequence[int]) -> str:
    """Fifteen digits and the check digit behind them (ISO/IEC 7812)."""
    doubled = [sum(divmod(2 * d, 10)) if place % 2 == 0 else d for place, d in enumerate(digits)]
    return "".join(map(str, [*digits, -sum(doubled) % 10]))


def write_corpus(folder: Path) -> None:
    """Write `folder`/train, of files in which each passage lies as often as it should, and a folder for each kind."""
    prose = "\n\n".join(topics[name] for name in sorted(topics))[:FILLER]
    rows = [prose[start : start + 1000] for start in range(0, len(prose), 1000)]
    for number, (kind, count) in enumerate(REPEATS.items()):
        texts = [passage(100 * number + i) for i in range(PASSAGES)]
        _write(folder / kind, texts)
        rows += texts * count
    random.Random(0).shuffle(rows)
    _write(folder / "train", rows)


def _write(folder: Path, texts: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:05}.txt").write_text(text)
