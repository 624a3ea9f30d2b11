"""Where a text may be cut so that its parts' ids, one after the other, are its own: most words come again and again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

SPACE = "▁"  # U+2581, how SentencePiece spells a space inside its pieces
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_OTHERS = frozenset(map(chr, range(128))) - _LETTERS - {" "}
_ROUNDS, _BRIDGES = 8, 16


def any_of(symbols: Iterable[str]) -> str:
    """A pattern that matches the longest of `symbols` that begins at a place; one that never matches for none."""
    heads: dict[str, list[str]] = {}
    for symbol in sorted(symbols, key=len, reverse=True):
        heads.setdefault(symbol[0], []).append(re.escape(symbol[1:]))
    # Grouped by the first character, most places are passed over by one look at a set.
    each = [f"{re.escape(head)}(?:{'|'.join(rest)})" for head, rest in heads.items()]
    return f"(?:{'|'.join(each)})" if each else "(?!)"


def whole(symbols: Collection[str]) -> re.Pattern[str]:
    """Cut nowhere but around `symbols` (text as it is typed) and around U+2581."""
    return re.compile(f"{_first(symbols)}{SPACE}|{_run(symbols, without=SPACE)}")


def finest_cut(pieces: Collection[str], symbols: Collection[str]) -> re.Pattern[str] | None:
    """The finest way to cut a text into words, None where there is none that we know.

    pieces: all that merging can make, as SentencePiece spells them; none may reach over a cut. SentencePiece's
    training keeps letters apart from punctuation, and spaces in front.
    symbols: what is cut out of a text before anything is merged, as it is typed.
    """
    others = _OTHERS
    for _ in range(_ROUNDS):
        other = _set(others)
        letter = f"[^ {SPACE}{other[1:]}"
        mixed = _unlike(pieces, f"{SPACE}+|{SPACE}?{letter}+|{SPACE}?{other}+")
        # A few pieces, such as Gemma 3's ">▁</", have a space between two runs of punctuation.
        bridges = [piece for piece in mixed if re.fullmatch(f"{other}+{SPACE}{other}+", piece)]
        if len(mixed) == len(bridges) <= _BRIDGES:
            letters = _run(symbols, without=others | {" ", SPACE})
            return _words(symbols, [letters, _run(symbols, of=others, over=bridges)])
        # Beyond ASCII all are letters until a piece joins one to a comma.
        more = {character for piece in mixed for character in piece if character > "\x7f"} - others - {SPACE}
        if not more:
            break
        others |= more
    if not _unlike(pieces, f"{SPACE}+|{SPACE}?[^{SPACE}]+"):
        return _words(symbols, [_run(symbols, without=f" {SPACE}")])
    return None


def _unlike(pieces: Collection[str], shape: str) -> list[str]:
    """Those that are not of that shape, without what no merge makes: <unused99> is only its own spelling."""
    alike = re.compile(shape).fullmatch
    unlike = [piece for piece in pieces if not alike(piece)]
    return [p for p in unlike if any(p[:cut] in pieces and p[cut:] in pieces for cut in range(1, len(p)))]


def _words(symbols: Collection[str], bodies: list[str]) -> re.Pattern[str]:
    spaces = f"(?:(?!{any_of(symbols)}) )" if any(symbol[0] == " " for symbol in symbols) else " "
    words = "|".join(f"{spaces}*{body}" for body in bodies)
    return re.compile(f"{_first(symbols)}{SPACE}|{words}|{spaces}+")


def _first(symbols: Collection[str]) -> str:
    return f"{any_of(symbols)}|" if symbols else ""


def _run(
    symbols: Collection[str], *, of: Collection[str] = (), without: Collection[str] = (), over: Collection[str] = ()
) -> str:
    """Characters of one kind, up to where one of `symbols` begins. of, without: the kind, or all but it.

    over: pieces with a space inside; where a text has one of them, the space belongs to the run.
    """
    heads = {symbol[0] for symbol in symbols}
    heads = heads & set(of) if of else heads - set(without)
    rest = _set(set(of) - heads) if of else _set({*without, *heads}, but=True)
    more = [f"(?<={re.escape(left)}) (?={re.escape(right)})" for left, right in (piece.split(SPACE) for piece in over)]
    if heads:
        more.append(f"(?!{any_of(symbols)}){_set(heads)}")
    return f"(?:{'|'.join([f'{rest}+', *more])})+" if more else f"{rest}+"


def _set(characters: Iterable[str], *, but: bool = False) -> str:
    return f"[{'^' if but else ''}{''.join(map(re.escape, sorted(characters)))}]"
