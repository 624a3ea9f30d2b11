"""Which text lies in which slot of the cache: where a new one begins with the least left to compute, and what fits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gemstill.infer.request import Answer
from gemstill.model.config import ModelConfig
from gemstill.model.slots import SlotCache

FIRST_CAPACITY = 512  # tokens that a slot has room for at first; it doubles when one is full
WORTH = 8  # tokens from which on a common beginning is copied, or waited for


class Match(NamedTuple):
    """A slot whose text begins as another: how many tokens they share, and whether they are computed already."""

    slot: int
    shared: int
    ready: bool


NOTHING = Match(-1, 0, True)


class Slots:
    """The slots of one cache: each is written by an answer, or holds the text of one that has ended, or is empty.

    The block of memory begins small. It grows to `most` slots of `context` tokens; where `memory` bytes are given,
    so far that all answers fit that it has admitted, each to its last token.
    """

    def __init__(
        self,
        config: ModelConfig,
        most: int,
        context: int,
        memory: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.most, self.context, self.memory = config, most, context, memory
        self.dtype, self.device = dtype, device
        self.cache: SlotCache | None = None
        self.users: list[Answer | None] = []
        self._texts: list[list[int]] = []  # what a slot held when its answer ended
        self._last: list[int] = []  # when it ended, as a count
        self._clock = 0
        self.tried = 0  # slots that there were to be, when memory was last asked for

    @property
    def busy(self) -> list[Answer]:
        """The answers that have a slot, in the order in which they were asked for."""
        return sorted((user for user in self.users if user is not None), key=lambda user: user.number)

    def needs(self, tokens: int) -> int:
        """Bytes of a slot for so many tokens."""
        return SlotCache.bytes_of(self.config, tokens, self.dtype)

    def of(self, answer: Answer) -> int:
        """The slot of an answer that has one."""
        assert answer.slot is not None
        return answer.slot

    def held(self, slot: int) -> int:
        """How many tokens a slot holds."""
        assert self.cache is not None
        return self.cache.lengths[slot]

    def admit(self, answer: Answer, waiting: int) -> bool:
        """Give an answer a slot, with what it can share there; False where it has to wait. `waiting`: with it."""
        busy = self.busy
        longest = max(user.most for user in [answer, *busy])
        most = self.most if self.memory is None else min(self.most, self.memory // self.needs(longest))
        if len(busy) >= most:
            return False
        self._shape(min(most, _power(len(busy) + waiting)), longest)
        match = self._match(answer)
        slot = self._choose(match, most, longest)
        assert self.cache is not None
        self.users[slot], answer.slot = answer, slot
        answer.begun = slot == match.slot
        self.cache.rewind(slot, match.shared if answer.begun else 0)
        return True

    def begin(self, answer: Answer) -> Match:
        """Take over what another slot holds of the text; the match is not ready where it is still being computed."""
        assert self.cache is not None
        match = self._match(answer)
        if match.ready:
            if match.shared >= WORTH:
                self.cache.copy_prefix(match.slot, self.of(answer), match.shared)
            answer.begun = True
        return match

    def make_room(self, tokens: int) -> None:
        """Have room for so many tokens in each slot; more than the longest answer may have is not asked for."""
        assert self.cache is not None
        if tokens > self.cache.capacity:
            longest = max(user.most for user in self.busy)
            capacity = min(max(2 * self.cache.capacity, tokens), longest)
            self._resize(list(range(len(self.users))), len(self.users), capacity)

    def release(self, answer: Answer, *, keep: bool) -> None:
        """Free an answer's slot; its text stays there to be shared where `keep` says so."""
        assert self.cache is not None
        slot, answer.slot, answer.begun = self.of(answer), None, False
        self._clock += 1
        self.users[slot], self._last[slot] = None, self._clock
        if not keep or answer.stale:
            self.cache.rewind(slot, 0)
        self._texts[slot] = answer.text[: self.held(slot)]

    def empty(self, answer: Answer) -> None:
        """Have an answer keep its slot and nothing in it."""
        assert self.cache is not None
        self.cache.rewind(self.of(answer), 0)
        answer.begun = False

    def forget(self) -> None:
        """Share nothing of what is computed by now: other weights would have made it otherwise."""
        assert self.cache is not None or not self.users
        for slot, user in enumerate(self.users):
            if user is not None:
                user.stale = True
            elif self.cache is not None:
                self.cache.rewind(slot, 0)
                self._texts[slot] = []

    def drop(self) -> list[Answer]:
        """Give all memory back; the answers that had a slot have none any more, and what was computed is lost."""
        lost = self.busy
        for answer in lost:
            answer.slot, answer.begun = None, False
        self.cache, self.users, self._texts, self._last = None, [], [], []
        return lost

    def _text(self, slot: int) -> list[int]:
        user = self.users[slot]
        return self._texts[slot] if user is None else user.text

    def _match(self, answer: Answer) -> Match:
        """The slot that shares most with an answer's text, all but its last token: that one's logits are wanted."""
        best, cache = NOTHING, self.cache
        if answer.request.prompt_logprobs or cache is None:
            return best
        for slot, user in enumerate(self.users):
            if slot == answer.slot or (user is not None and (user.stale or not user.begun)):
                continue
            shared = min(_common(self._text(slot), answer.text), len(answer.text) - 1)
            ready = shared <= cache.lengths[slot]
            if shared < (1 if user is None else WORTH) or (ready and not cache.holds(slot, shared)):
                continue
            # Among equals one that nobody uses.
            if shared > best.shared or (shared == best.shared and user is None):
                best = Match(slot, shared, ready)
        return best

    def _choose(self, match: Match, most: int, longest: int) -> int:
        """The slot for a text: the one that it goes on in, or an empty one, or the one longest unused."""
        idle = [slot for slot, user in enumerate(self.users) if user is None]
        if match.slot in idle and match.shared + WORTH >= self.held(match.slot):
            return match.slot
        if empty := [slot for slot in idle if not self.held(slot)]:
            return empty[0]
        count = len(self.users)
        if (more := min(most, 2 * count)) > count and self._fits(more, longest):
            self._shape(more, longest)
            return count
        return min(idle, key=lambda slot: self._last[slot])

    def _fits(self, count: int, longest: int) -> bool:
        assert self.cache is not None
        return self.memory is None or count * self.needs(max(self.cache.capacity, longest)) <= self.memory

    def _shape(self, count: int, longest: int) -> None:
        """Have `count` slots, if memory allows, of which one is free, for texts of `longest` tokens at most."""
        if self.cache is None:
            self._resize([], count, min(longest, FIRST_CAPACITY))
            return
        capacity = self.cache.capacity
        if self._fits(max(count, len(self.users)), longest):
            if count > len(self.users):
                self._resize(list(range(len(self.users))), count, capacity)
            return
        # The busy ones stay, and those that ended last as far as there is room, but for one slot.
        assert self.memory is not None
        capacity = min(capacity, longest)
        count = min(count, self.memory // self.needs(longest))
        idle = [slot for slot, user in enumerate(self.users) if user is None and self.held(slot) <= capacity]
        idle.sort(key=lambda slot: -self._last[slot])
        busy = [slot for slot, user in enumerate(self.users) if user is not None]
        self._resize([*busy, *idle[: count - 1 - len(busy)]], count, capacity)

    def _resize(self, keep: list[int], count: int, capacity: int) -> None:
        self.tried = count
        if self.cache is None:
            self.cache = SlotCache(self.config, count, capacity, self.dtype, self.device)
        else:
            self.cache.resize(keep, count, capacity)
        extra = count - len(keep)
        self.users = [*(self.users[slot] for slot in keep), *[None] * extra]
        self._texts = [*(self._texts[slot] for slot in keep), *([] for _ in range(extra))]
        self._texts = [text[:length] for text, length in zip(self._texts, self.cache.lengths, strict=True)]
        self._last = [*(self._last[slot] for slot in keep), *[0] * extra]
        for slot, user in enumerate(self.users):
            if user is not None:
                user.slot = slot


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    short = min(len(a), len(b))
    if a[:short] == b[:short]:
        return short
    return next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
