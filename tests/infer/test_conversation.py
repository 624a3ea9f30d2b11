"""Conversations: only what is new is fed, the context never overflows, and what is saved comes back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gemstill.core.errors import Error
from gemstill.infer import engine as room
from gemstill.infer.conversation import Conversation, read_turns
from gemstill.infer.engine import Engine
from gemstill.infer.generate import Generation, Limits
from gemstill.infer.sampling import Sampling
from gemstill.text.turns import encode_turns
from tests.infer.networks import SMALL, SMALL3, lean, network, plain
from tests.model.reference import name_of
from tests.model.tokenizers import small_tokenizer


def talk(config=SMALL, **options):
    options = {"max_new_tokens": 12} | options
    return Conversation(network(config), small_tokenizer(), **options)


def say(conversation, text):
    return "".join(conversation.say(text))


@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=name_of)
def test_later_turns_prefill_only_what_is_new_and_answer_as_from_a_fresh_start(config):
    """The window is 4 tokens: rings have long wrapped, so one token read back otherwise would cost the whole cache."""
    conversation = talk(config, system="Be brief.")
    before = 0
    for text in ("def area", "width * height", "# 東京 🙂"):
        answer = say(conversation, text)
        reply = conversation.reply
        fresh = Generation(Engine(conversation.engine.model), small_tokenizer(), reply.prompt, Sampling(), Limits(12))
        assert "".join(fresh) == answer
        assert [token.id for token in fresh.tokens] == [token.id for token in reply.tokens]
        if before:
            # All but the last token of the answer before was fed then; the rest is the new turn.
            assert reply.prefilled == len(reply.prompt) - before + 1
        before = len(reply.prompt) + len(reply.tokens)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3


def test_what_the_model_sees_are_the_turns():
    """The prompt spells out what a fresh encoding of all turns does, but for how an answer is cut into tokens."""
    conversation = Conversation(plain(network()), small_tokenizer(), max_new_tokens=12, system="Be brief.")
    for text in ("def area", "and a circle?"):
        say(conversation, text)
    asked = [{"role": "system", "content": "Be brief."}, *conversation.messages[:-1]]
    written = small_tokenizer().decode(conversation.reply.prompt)
    answer = conversation.messages[1]["content"]
    whole = small_tokenizer().decode(encode_turns(small_tokenizer(), asked))
    assert written.replace(answer, answer.strip()) == whole


def test_the_oldest_turns_leave_when_the_context_is_full():
    conversation = talk(replace(SMALL, max_position=160), system="Be brief.")
    left = []
    for number in range(12):
        say(conversation, f"question {number}!")
        assert len(conversation.reply.prompt) + len(conversation.reply.tokens) <= 160
        assert conversation.reply.ended == "length"  # there was room for the whole answer
        written = small_tokenizer().decode(conversation.reply.prompt)
        assert "Be brief." in written
        assert [f"question {n}!" in written for n in range(number + 1)] == [
            n >= conversation.left // 2 for n in range(number + 1)
        ]
        left.append(conversation.left)
    assert left == sorted(left)
    assert 0 in left
    assert len(set(left)) > 2
    assert len(set(left)) < len(left) - 2  # not at every turn: each time costs a prefill of what stays
    assert len(conversation.messages) == 24


def test_a_message_too_long_is_refused_and_the_conversation_goes_on():
    conversation = talk(replace(SMALL, max_position=80))
    say(conversation, "def")
    with pytest.raises(Error, match=r"takes \d+ tokens of a context of 80"):
        say(conversation, "area(width, height) " * 40)
    assert len(conversation.messages) == 2
    assert conversation.left == 0
    say(conversation, "go on")
    assert len(conversation.messages) == 4


def test_a_stopped_answer_stays_as_far_as_it_came():
    conversation = talk(max_new_tokens=200)
    got = ""
    for piece in conversation.say("def"):
        got += piece
        conversation.stop()
    assert conversation.reply.ended == "cancelled"
    assert conversation.messages[-1] == {"role": "assistant", "content": got}
    assert say(conversation, "go on")
    assert conversation.reply.prefilled < len(conversation.reply.prompt)


def test_a_turn_stopped_before_its_first_token_is_not_kept(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 4)
    monkeypatch.setattr(room, "FEW", 3)  # through the layers one by one
    conversation = talk()
    conversation.engine.model.layers[0].register_forward_hook(lambda *_: conversation.stop())  # on the way through it
    assert list(conversation.say("def")) == []
    assert conversation.reply.prefilled == 4
    assert conversation.messages == []


def test_an_empty_answer_is_a_turn():
    tokenizer = small_tokenizer()
    end = tokenizer.token_id("<end_of_turn>")
    for sign in (5.0, -5.0):
        conversation = Conversation(lean(network(), [end], by=sign), tokenizer, max_new_tokens=5)
        if say(conversation, "def") == "" and conversation.reply.ended == "end":
            break
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}
    say(conversation, "again")
    assert len(conversation.messages) == 4


def test_turns_draw_differently_and_the_conversation_repeats_with_its_seed():
    def answers(seed):
        conversation = talk(sampling=Sampling(3.0, seed=seed))
        return [say(conversation, "def") for _ in range(3)]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 3


def test_reset_and_tell():
    conversation = talk(system="Be brief.")
    first = say(conversation, "def")
    say(conversation, "go on")
    conversation.reset()
    assert say(conversation, "def") == first
    conversation.tell("Be long.")
    say(conversation, "go on")
    written = small_tokenizer().decode(conversation.reply.prompt)
    assert "Be long." in written
    assert "Be brief." not in written
    assert len(conversation.messages) == 4


def test_saved_it_goes_on_elsewhere(tmp_path):
    conversation = talk(system="Be brief.")
    say(conversation, "def straße")
    conversation.save(tmp_path / "talk.json")
    other = talk()
    other.reset(read_turns(tmp_path / "talk.json"))
    assert (other.system, other.messages) == (conversation.system, conversation.messages)
    say(other, "go on")
    assert "def straße" in small_tokenizer().decode(other.reply.prompt)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"system": 3},
        {"messages": {}},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]},
        {"messages": [3, 4]},
    ],
)
def test_files_that_are_no_conversation_are_refused(tmp_path, change):
    record = {"format": "gemstill conversation", "version": 1, "system": "", "messages": []}
    (tmp_path / "talk.json").write_text(json.dumps(record | change))
    with pytest.raises(Error, match=r"talk\.json"):
        read_turns(tmp_path / "talk.json")
