"""Conversations as the Gemma family was trained on them (Gemma 2 report, Tables 4 and 5): messages to ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.text import template as templates
from gemstill.text.template import Case, Layout, Slot, joined
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.vocabulary import END_OF_TURN, START_OF_TURN

_MARK = "\ufdd0"  # a code point that no text holds: Unicode keeps it for use within programs
_MARKED = re.compile(f"{_MARK}({_MARK}?)")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation, behind one BOS, as the model's own chat template lays it out.

    messages: {"role": "user", "assistant" or "model", "content": text} in turn, the user first; a "system" message
    may stand before them and is folded into the first of the user's where the template has no other place for it.
    add_generation_prompt: begin the model's next turn. Without it a conversation that the model ends is closed by
    <end_of_turn><eos>, as in training; earlier turns of the model have no <eos>.

    What is said never becomes a control token, however it is spelled, and never goes through the template: that is
    rendered with marks in its place. A template that lays out as we do, which is remembered, is not run again.

    Raises:
        Error: roles that do not alternate, contents that are not text, a vocabulary without the control tokens of
            turns, a template that fails or takes too much time or memory.
    """
    return _encode(tokenizer, *_laid_out(tokenizer, messages, add_generation_prompt))


def render_turns(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """The conversation as one string, for libraries that pass strings on; `encode_rendered` knows its ids.

    Without add_generation_prompt the last message is left open: the string ends with what is said in it. A control
    token that is spelled out in what is said has a mark within, so that it stays text. Raises Error as `encode_turns`.
    """
    layout, _, contents = _laid_out(tokenizer, messages, add_generation_prompt)
    layout = layout if add_generation_prompt else _left_open(layout)
    return "".join(part if isinstance(part, str) else _marked(tokenizer, part.fill(contents)) for part in layout)


def render_with(
    template: str,
    tokens: tuple[tuple[str, str], ...],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as any model's chat template has it, as one string: what `transformers` makes of it.

    tokens: bos_token and others by name. Without add_generation_prompt the last message is left open. A control token
    that is spelled out in what is said will be read as one.

    Raises:
        Error: roles that do not alternate, contents that are not text, a template that fails, or takes too much time
            or memory.
    """
    case, contents = _read(messages, add_generation_prompt)
    layout = list(templates.layout(template, case, tokens))
    layout = layout if add_generation_prompt else _left_open(layout)
    return "".join(part if isinstance(part, str) else part.fill(contents) for part in layout)


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in which control tokens are spelled out, those apart that `render_turns` has marked."""
    ids: list[int] = []
    for part in tokenizer.split_controls(text):
        ids += tokenizer.encode(_MARKED.sub(r"\1", part)) if isinstance(part, str) else [part]
    return ids


def _left_open(layout: Layout) -> Layout:
    """The layout up to what is said last."""
    said = [place for place, part in enumerate(layout) if isinstance(part, Slot)]
    return layout[: said[-1] + 1] if said else layout


def _marked(tokenizer: Tokenizer, said: str) -> str:
    """What is said with a mark in each control token that it spells; a mark that it holds itself is doubled."""
    parts = tokenizer.split_controls(said.replace(_MARK, 2 * _MARK))
    spelled = [tokenizer.decode([part]) if isinstance(part, int) else part for part in parts]
    return "".join(
        text[:1] + _MARK + text[1:] if isinstance(part, int) else text
        for part, text in zip(parts, spelled, strict=True)
    )


def _laid_out(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], prompt: bool
) -> tuple[Layout, Case, list[str]]:
    """The layout of a conversation, by the model's own template or, which is the same or it has none, the report's."""
    case, contents = _read(messages, prompt)
    tokens = _named_tokens(tokenizer)
    own = tokenizer.chat_template
    if own is None:
        _check_tokens(tokenizer)
        return _ours(case, tokens), case, contents
    try:
        verdict = templates.judge(own, tuple(tuple(_ours(each, tokens)) for each in templates.GRID), tokens)
        if verdict.same:
            _check_tokens(tokenizer)
            return _ours(case, tokens), case, contents
        note("its chat template differs from the Gemma report's turns; the template is used", where=tokenizer.source)
        if case.roles[0] == "system" and not verdict.takes_system:
            folded = f"{contents[0]}\n\n{contents[1].strip()}"
            case, contents = Case(case.roles[1:], case.prompt), [folded, *contents[2:]]
        return list(templates.layout(own, case, tokens)), case, contents
    except Error as error:
        if error.where:
            raise
        fix = error.fix or "remove the chat template from the file if you trust the usual turns"
        raise Error(error.what, where=tokenizer.source, fix=fix) from error


def _read(messages: Sequence[Mapping[str, Any]], prompt: bool) -> tuple[Case, list[str]]:
    """The outline of a conversation, and what is said in it."""
    roles: list[str] = []
    contents: list[str] = []
    for place, message in enumerate(messages):
        where = f"message {place + 1}"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise Error("is not a 'role' with a 'content'", where=where)
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise Error(f"its role is {role!r}", where=where, fix="write system, user or model")
        if not isinstance(content, str):
            parts = content if isinstance(content, list) else []
            kinds = {part.get("type") for part in parts if isinstance(part, Mapping)} - {"text", None}
            what = "holds something other than text, and this is a text model" if kinds else "its content is not text"
            raise Error(what, where=where, fix="write its content as one string")
        roles.append(ROLES[role])
        contents.append(content)
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk:
        raise Error("nothing is said by the user", where="messages", fix="add a message of the role user")
    for place, role in enumerate(talk):
        expected = ("user", "assistant")[place % 2]
        if role != expected:
            what = f"its role is {role}, where {expected} should follow"
            fix = "let user and model take turns, the user first, a system message only before them"
            raise Error(what, where=f"message {place + 1 + len(roles) - len(talk)}", fix=fix)
    if prompt and talk[-1] == "assistant":
        raise Error("the model has the last word already", where="messages", fix="end with a message of the user")
    return Case(tuple(roles), prompt), contents


def _ours(case: Case, tokens: tuple[tuple[str, str], ...]) -> Layout:
    """The report's layout: <bos>, then each turn between its control tokens, what is said stripped of white space."""
    parts: Layout = [dict(tokens)["bos_token"]]
    system = case.roles[0] == "system"
    for place, role in enumerate(case.roles):
        if role == "system":
            continue
        parts.append(f"{START_OF_TURN}{'model' if role == 'assistant' else role}\n")
        if system and place == 1:
            parts += [Slot(0, strip_left=False, strip_right=False), "\n\n"]
        parts += [Slot(place), f"{END_OF_TURN}\n"]
    if case.prompt:
        parts.append(f"{START_OF_TURN}model\n")
    return joined(parts)


def _encode(tokenizer: Tokenizer, layout: Layout, case: Case, contents: Sequence[str]) -> list[int]:
    """Fill the layout in and encode what stands between two of its control tokens as text."""
    last = layout[-1] if layout else ""
    if not case.prompt and case.roles[-1] == "assistant" and isinstance(last, str) and last.strip() == END_OF_TURN:
        layout = [*layout[:-1], END_OF_TURN, tokenizer.decode([tokenizer.eos_id])]
    ids: list[int] = [tokenizer.bos_id]
    text = ""
    for part in layout:
        if isinstance(part, Slot):
            text += part.fill(contents)
            continue
        for piece in tokenizer.split_controls(part):
            if isinstance(piece, str):
                text += piece
            else:
                ids += tokenizer.encode(text)
                text = ""
                if piece != tokenizer.bos_id:  # it stands in front already
                    ids.append(piece)
    return ids + tokenizer.encode(text)


def _named_tokens(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    names = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    return tuple((f"{name}_token", tokenizer.decode([number])) for name, number in names.items())


def _check_tokens(tokenizer: Tokenizer) -> None:
    for token in (START_OF_TURN, END_OF_TURN):
        if tokenizer.token_id(token) not in tokenizer.control_ids:
            fix = "use an instruction-tuned model, or `gemstill generate` to continue a text"
            raise Error(f"the vocabulary has no {token}, so there are no turns", where=tokenizer.source, fix=fix)
