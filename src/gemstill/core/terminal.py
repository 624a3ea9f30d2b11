"""Text from elsewhere on a terminal: a model or a file may hold escape sequences, which a terminal would obey."""

from __future__ import annotations

_SAFE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # their pictures: ␀ … ␛ …
_SAFE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with control characters, but line feeds and tabs, shown as pictures.

    >>> printable("\\x1b[2J")
    '␛[2J'
    """
    return text.translate(_SAFE)
