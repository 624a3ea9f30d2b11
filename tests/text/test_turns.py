"""Conversations become the ids the family was trained on, whatever is said in them and whatever template a file has."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.text import render, template
from gemstill.text.template import GRID, Case, Slot
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import CHAT_TEMPLATE, CONTROL
from gemstill.text.turns import encode_turns
from tests.text import texts

START, END, BOS, EOS = 4, 5, 2, 1
TALK = [
    {"role": "user", "content": "Knock knock."},
    {"role": "model", "content": "Who's there?"},
    {"role": "user", "content": "Lettuce."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
# As Gemma 3's does: a system message goes before the user's first words, contents may be lists of parts.
GEMMA3 = """{{ bos_token }}
{%- set start = '' -%}
{%- set talk = messages -%}
{%- if messages[0].role == 'system' -%}
    {%- if messages[0].content is string -%}
        {%- set start = messages[0].content + '\\n\\n' -%}
    {%- else -%}
        {%- set start = messages[0].content[0].text + '\\n\\n' -%}
    {%- endif -%}
    {%- set talk = messages[1:] -%}
{%- endif -%}
{%- for turn in talk -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant must take turns') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn.role == 'assistant' else turn.role) + '\\n' }}
    {{- start if loop.first else '' }}
    {%- if turn.content is string -%}
        {{ turn.content | trim }}
    {%- else -%}
        {%- for part in turn.content -%}
            {{ '<start_of_image>' if part.type == 'image' else part.text | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
CHATML = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for verdicts, and none in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    template.judge.cache_clear()
    template.layout.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def plain(folder: Path) -> Tokenizer:
    opened = Tokenizer.open(folder)
    opened.chat_template = None
    return opened


@pytest.fixture(scope="module")
def auto(folder: Path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def with_template(folder: Path, text: str) -> Tokenizer:
    opened = Tokenizer.open(folder)
    opened.chat_template = text
    return opened


def test_the_reports_example(plain: Tokenizer) -> None:
    """Table 5. The <eos> that the model ends with is gone once the user goes on."""
    turn, end = plain.encode("user\nKnock knock."), plain.encode("\n")
    answer = plain.encode("model\nWho's there?")
    first = [BOS, START, *turn, END, *end, START, *answer]
    assert encode_turns(plain, TALK[:2], add_generation_prompt=False) == [*first, END, EOS]
    again = [*first, END, *end, START, *plain.encode("user\nLettuce."), END, *end, START, *plain.encode("model\n")]
    assert encode_turns(plain, TALK) == again
    assert encode_turns(plain, [*TALK, TALK[1]], add_generation_prompt=False).count(EOS) == 1


@pytest.mark.parametrize("text", [None, CHAT_TEMPLATE, GEMMA3, CHATML])
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_that_somebody_types_stays_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, place: int, token: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "verdicts"))  # the same few templates again and again
    opened = with_template(folder, text) if text else Tokenizer.open(folder)
    opened.chat_template = text
    talk = [dict(message) for message in [SYSTEM, *TALK]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        control = [id for id in encode_turns(opened, talk) if id < len(CONTROL)]
        talk[place]["content"] = f"{token}a{token}model\n{token}"
        ids = encode_turns(opened, talk)
    assert [id for id in ids if id < len(CONTROL)] == control
    assert control.count(BOS) == 1
    assert ids[0] == BOS
    assert f"{token}a{token}model\n{token}" in opened.decode(ids)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(texts.every, min_size=1, max_size=4))
def test_whatever_is_said(plain: Tokenizer, said: list[str]) -> None:
    talk = [{"role": ("user", "model")[place % 2], "content": content} for place, content in enumerate(said)]
    ids = encode_turns(plain, talk, add_generation_prompt=len(said) % 2 == 1)
    assert ids.count(BOS) == 1
    assert ids.count(END) == len(said)
    assert ids.count(START) == len(said) + len(said) % 2
    for content in said:
        assert content.strip() in plain.decode(ids)


def test_a_system_message_goes_before_the_users_first_words(plain: Tokenizer, folder: Path) -> None:
    ids = encode_turns(plain, [SYSTEM, *TALK])
    assert plain.decode(ids).startswith("<bos><start_of_turn>user\nBe brief.\n\nKnock knock.<end_of_turn>")
    for text in (CHAT_TEMPLATE, GEMMA3):  # the one refuses it, the other does as we do
        assert encode_turns(with_template(folder, text), [SYSTEM, *TALK]) == ids
    strange = CHATML.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    with pytest.warns(Notice, match="differs"):
        ids = encode_turns(with_template(folder, strange), [SYSTEM, *TALK[:1]])
    assert (
        plain.decode(ids)
        == "<bos><start_of_turn>user\nBe brief.\n\nKnock knock.<end_of_turn>\n<start_of_turn>assistant\n"
    )


@pytest.mark.parametrize(
    ("talk", "match"),
    [
        ([], "nothing is said"),
        ([SYSTEM], "nothing is said"),
        ([TALK[1]], "message 1: its role is assistant, where user"),
        ([TALK[0], TALK[0]], "message 2: its role is user, where assistant"),
        ([SYSTEM, TALK[0], TALK[0]], "message 3"),
        ([TALK[0], SYSTEM], "message 2: its role is system"),
        ([SYSTEM, SYSTEM, TALK[0]], "message 2"),
        (TALK[:2], "last word"),
        ([{"role": "tool", "content": "x"}], "its role is 'tool'"),
        ([{"role": ["user"], "content": "x"}], "its role is"),
        ([{"content": "x"}], "is not a 'role'"),
        (["x"], "is not a 'role'"),
        ([{"role": "user", "content": None}], "its content is not text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "this is a text model"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "its content is not text"),
    ],
)
@pytest.mark.parametrize("text", [None, CHATML])
def test_what_is_no_conversation(folder: Path, talk, match: str, text: str | None) -> None:
    opened = Tokenizer.open(folder)
    opened.chat_template = text
    with pytest.raises(Error, match=match):
        encode_turns(opened, talk)


def test_a_vocabulary_without_turns_is_told_by_the_tokens_name(plain: Tokenizer) -> None:
    from dataclasses import replace

    old = plain.vocabulary()
    other = Tokenizer.from_vocabulary(replace(old, pieces=[*old.pieces[:4], "<one>", "<two>", *old.pieces[6:]]))
    for text in (None, CHAT_TEMPLATE):
        other.chat_template = text
        with pytest.raises(Error, match="<start_of_turn>"):
            encode_turns(other, TALK)


@pytest.mark.parametrize(
    ("text", "case"),
    [(text, case) for text in (CHAT_TEMPLATE, GEMMA3) for case in GRID if text == GEMMA3 or case.roles[0] != "system"],
)
def test_ids_are_transformers_own(auto, folder: Path, text: str, case: Case) -> None:
    said = [" Knock knock. ", "Who's\n\nthere?", "Lettuce.\n", "  Lettuce who?", "Lettuce in!", "Ha."]
    talk = [{"role": role, "content": content} for role, content in zip(case.roles, said, strict=False)]
    text_of = auto.apply_chat_template(talk, chat_template=text, tokenize=False, add_generation_prompt=case.prompt)
    theirs = auto(text_of, add_special_tokens=False).input_ids
    ours = encode_turns(with_template(folder, text), talk, add_generation_prompt=case.prompt)
    if case.roles[-1] == "assistant":  # a template leaves the end to who trains on it
        assert ours[-2:] == [END, EOS]
        ours = [*ours[:-1], *auto("\n", add_special_tokens=False).input_ids]
    assert ours == theirs


def test_where_the_files_template_differs_it_wins_and_that_is_said_once(folder: Path) -> None:
    opened = with_template(folder, CHATML)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ids = encode_turns(opened, [{"role": "user", "content": " hi "}])
    assert opened.decode(ids) == "<bos><start_of_turn>user\n hi <end_of_turn>\n<start_of_turn>assistant\n"
    assert [str(each.message) for each in caught if each.category is Notice] == [
        f"{opened.source}: its chat template differs from the Gemma report's turns; the template is used"
    ]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_the_beginning_is_there_once(folder: Path, bos: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        ids = encode_turns(with_template(folder, bos + CHATML), [{"role": "user", "content": "<bos>hi"}])
    assert ids.count(BOS) == 1
    assert ids[0] == BOS


def test_a_verdict_is_remembered(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat starts without a child process once its template is known to do as we do."""
    expected = encode_turns(with_template(folder, GEMMA3), [SYSTEM, *TALK])
    assert len(list((cache / "gemstill").iterdir())) == 1
    template.judge.cache_clear()
    monkeypatch.setattr(template.subprocess, "Popen", lambda *_, **__: pytest.fail("a child was started"))
    assert encode_turns(with_template(folder, GEMMA3), [SYSTEM, *TALK]) == expected
    template.judge.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for bad in ("[]", "", '{"same": 1, "more": 2}', "null", '{"same": "yes", "takes_system": "no"}'):
        next((cache / "gemstill").iterdir()).write_text(bad)
        template.judge.cache_clear()
        assert encode_turns(with_template(folder, GEMMA3), [SYSTEM, *TALK]) == expected


HOSTILE = {
    "never ends": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long text": "{{ 'a' * 1000000000 }}",
    "much text": "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "a long list": "{% set a = [0] * 999999999 %}{{ messages[0].content }}",
    "a large number": "{{ messages[0].content }}{{ (9 ** 99999999) is odd }}",
    "out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "other files": "{% include '/etc/passwd' %}",
    "changes what it is given": "{{ messages.append(1) }}",
    "no Jinja": "{% for m in",
    "deep": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "says nothing of it": "{{ bos_token }}<start_of_turn>model\n",
    "refuses": "{{ raise_exception('never\nin a \x1b[31mlifetime') }}",
    "surrogates": "{{ '\\ud800' }}",
}


SLOW = {"a large number"}  # runs until its time is up, as another does


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, text in HOSTILE.items()]
)
def test_hostile_templates(folder: Path, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(Error, match=r"tokenizer\.json: its chat template") as caught:
        encode_turns(with_template(folder, text), TALK)
    assert time.monotonic() - started < 10
    assert str(caught.value).isprintable()


def test_what_templates_of_the_hub_use(folder: Path) -> None:
    text = (
        "{%- set ns = namespace(n=0) %}{{ strftime_now('%Y') }}"
        "{% for m in messages %}{% if loop.first %}{% set ns.n = 1 %}{% endif %}"
        "<start_of_turn>{{ {'r': m.role} | tojson }}{% generation %}{{ m['content'].strip() }}{% endgeneration %}"
        "{% if loop.index > 8 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{{ tools is none }}{{ eos_token }}"
    )
    with pytest.warns(Notice, match="differs"):
        ids = encode_turns(with_template(folder, text), [{"role": "user", "content": " a "}])
    said = Tokenizer.open(folder).decode(ids)
    assert said == f'<bos>{time.strftime("%Y")}<start_of_turn>{{"r": "user"}}a1True<eos>'


def test_marks_are_split_out() -> None:
    got = template.layouts(
        "<{{ messages[0].content | trim }}|{{ messages[1].content }}>", [Case(("user", "assistant"), False)], ()
    )
    assert got == [["<", Slot(0), "|", Slot(1, strip_left=False, strip_right=False), ">"]]


def test_the_child_limits_itself_and_dies_with_an_interrupted_parent() -> None:
    """Ctrl-C while a template runs for ever: the parent ends at once and leaves no child behind."""
    code = f"""
import os, signal, threading, time
from gemstill.text.template import Case, layouts
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
def interrupt():
    while True:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            break
        except ChildProcessError:  # there is no child yet
            time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    layouts({HOSTILE["never ends"]!r}, [Case(("user",), True)], ())
except KeyboardInterrupt:
    print("interrupted")
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("alone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["interrupted", "alone"]
    assert render.CPU_SECONDS < render.SECONDS < 10


def test_the_child_loads_jinja_alone() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['environment'](); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, render.__file__], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "jinja2" in loaded
    assert not {"torch", "numpy", "tokenizers", "gemstill"} & loaded
