"""The page that all reports share: one HTML file, light and dark, no address outside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

HERE = Path(__file__).parent


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file around the parts of its body (HTML)."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<script>\n{script}</script></body></html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures; the first column names its row."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what they are; rows without anything are left out."""
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows if value
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Figures to see first: (figure, what it is)."""
    each = (f'<div class="tile"><b>{escape(figure)}</b><span>{escape(text)}</span></div>' for figure, text in items)
    return f'<div class="tiles">{"".join(each)}</div>'


def sample(name: str, prompt: str, text: str, color: int) -> str:
    """What a model wrote after a prompt."""
    return (
        f'<div class="sample c{color}"><h3>{escape(name)}</h3>'
        f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre></div>'
    )


def command(line: str) -> str:
    """A command to copy."""
    return f'<pre class="command">{escape(line)}</pre>'
