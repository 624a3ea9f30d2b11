"""A teacher behind an OpenAI-compatible server that tells the log-probabilities of a prompt, as vLLM does.

POST /v1/completions with a prompt of ids and `prompt_logprobs: k` answers, for each token of the prompt, with the k
likeliest entries in its place and their log-probabilities (docs.vllm.ai, OpenAI-compatible server). Servers that know
no `prompt_logprobs` are asked with `echo: true, logprobs: k, return_tokens_as_token_ids: true` instead; tokens told
by their text alone are no use, since several ids share one text. Only `topk` can be made of either.

Each document of a window is a request of its own, so that it sees itself alone; several are under way at once. What
may pass (no connection, 429, 5xx, half an answer) is tried again with growing pauses.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.core.server import AT_ONCE, PassingError, Server
from gemstill.ops.target import Target
from gemstill.text.tokenizer import Tokenizer

_TOKEN = "token_id:"
_SAMPLE = "The teacher's tokenizer, asked: 1234.5 + 67 = ?\n\tdéjà vu, naïve façade — 東京 🙂 def f(x): return x**2"
_VLLM = "serve the model with vLLM, whose /v1/completions knows prompt_logprobs"


class ServerTeacher:
    """A server's model as a teacher of its `entries` likeliest entries. Use `open`."""

    licence, precision, vocab_size, sparse = "unknown", "unknown", None, True

    def __init__(self, server: Server, entries: int) -> None:
        self._server, self.url, self.name, self.entries = server, server.url, server.name, entries
        self.echo = False  # the form to ask in
        self.fingerprint = hashlib.sha256(f"server/{server.name}".encode()).hexdigest()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="teacher")

    @staticmethod
    def open(place: str, tokenizer: Tokenizer, entries: int) -> ServerTeacher:
        """Reach the server at "http://host:8000/v1#model" and see that it is of use.

        Without a name, its only model is taken. The key is read from GEMSTILL_API_KEY.

        Raises:
            Error: it cannot be reached, refuses, has no such model, tells no log-probabilities of prompts or not so
                many, or has another tokenizer.
        """

        def mend(reason: str) -> str:
            return f"start the server with --max-logprobs {entries}" if "logprobs" in reason else "look at the server"

        teacher = ServerTeacher(Server.open(place, mend), entries)
        teacher._expect_tokenizer(tokenizer)
        teacher._choose_form(tokenizer)
        return teacher

    def distribution(self, tokens: Tensor, documents: Tensor) -> Target:
        """See Teacher. Each row's `entries` likeliest, largest first, with their own probabilities (they sum below 1).

        Raises:
            Error: the server does not answer, or not with what was asked for.
        """
        device, tokens, documents = tokens.device, tokens.cpu(), documents.cpu()
        rows, width = tokens.shape
        pieces = [(row, *span) for row in range(rows) for span in _spans(documents[row])]
        prompts = [tokens[row, start:stop].tolist() for row, start, stop in pieces]
        target = Target(
            torch.zeros(rows * width, self.entries, dtype=torch.int64),
            torch.zeros(rows * width, self.entries),
            (documents >= 0).float().reshape(-1),
        )
        self._server.over.clear()
        jobs = [self._pool.submit(self._piece, prompt) for prompt in prompts]
        try:
            for (row, start, _), job in zip(pieces, jobs, strict=True):
                for at, entries in enumerate(job.result(), row * width + start):
                    ids, logprobs = zip(*entries, strict=True)
                    target.ids[at, : len(ids)] = torch.tensor(ids)
                    target.probs[at, : len(ids)] = torch.tensor(logprobs, dtype=torch.float64).exp().float()
        except BaseException:
            self._server.over.set()
            for job in jobs:
                job.cancel()
            raise
        return Target(*(part.to(device) for part in target))

    def _piece(self, prompt: list[int]) -> list[list[tuple[int, float]]]:
        """The likeliest entries after each token of a document."""
        # What comes after the last token is told in the place of one more, whichever it is.
        asked = [*prompt, prompt[-1]]
        form = {"prompt_logprobs": self.entries}
        if self.echo:
            form = {"echo": True, "logprobs": self.entries, "return_tokens_as_token_ids": True}
        body = {"model": self.name, "prompt": asked, "max_tokens": 1, "temperature": 1.0} | form
        found: list[list[tuple[int, float]]] = self._server.ask(
            "POST", "/completions", body, lambda answer: self._entries(answer, len(asked))
        )
        return found

    def _entries(self, answer: dict[str, Any], length: int) -> list[list[tuple[int, float]]]:
        """The entries in the places 1 … length − 1 of a prompt. Raises PassingError for half an answer."""
        if answer.get("model") != self.name:
            what = f"answers for the model '{answer.get('model')}', not for '{self.name}'"
            raise Error(what, where=self.url, fix="name the model that it serves")
        try:
            choice = answer["choices"][0]
            part = choice.get("logprobs") if self.echo else choice
            places = (part or {}).get("top_logprobs" if self.echo else "prompt_logprobs")
            if places is None:
                raise Error("tells no log-probabilities of a prompt's tokens", where=self.url, fix=_VLLM)
            found = [[self._entry(key, value) for key, value in place.items()] for place in places[1:length]]
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise PassingError(f"gives half an answer ({type(error).__name__}: {error})") from error
        if len(found) != length - 1 or not all(found):
            raise PassingError(f"gives half an answer ({len(found)} places of {length - 1})")
        if any(not value <= 1e-3 for place in found for _, value in place):  # NaN too
            raise Error("gives log-probabilities that are none", where=self.url, fix="look at the server's model")
        # The token that stood there is told too, however unlikely it is; -9999 is vLLM's way to say never.
        ordered = [sorted(place, key=lambda entry: (-entry[1], entry[0]))[: self.entries] for place in found]
        return [[(number, value) for number, value in place if value > -1e3] for place in ordered]

    def _entry(self, key: str, value: Any) -> tuple[int, float]:
        if not self.echo:
            return int(key), float(value["logprob"])
        if not key.startswith(_TOKEN):
            raise Error("tells tokens by their text, which several share", where=self.url, fix=_VLLM)
        return int(key.removeprefix(_TOKEN)), float(value)

    def _choose_form(self, tokenizer: Tokenizer) -> None:
        """Find out how the server tells a prompt's log-probabilities. Raises Error where it does not."""
        sample = [tokenizer.bos_id, *tokenizer.encode(_SAMPLE)]
        first: Error | None = None
        for self.echo in (False, True):
            try:
                known = self._piece(sample)
            except Error as error:
                first = first or error
                continue
            largest = max(number for place in known for number, _ in place)
            if largest >= tokenizer.vocab_size:
                what = f"names entry {largest} of a vocabulary of {tokenizer.vocab_size}"
                raise Error(what, where=self.url, fix="use a teacher of this tokenizer")
            return
        assert first is not None
        raise first

    def _expect_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a server that makes other ids of a text; not all servers can be asked (vLLM's /tokenize)."""
        root = self.url.removesuffix("/v1")
        body = {"model": self.name, "prompt": _SAMPLE, "add_special_tokens": False}
        try:
            answer = self._server.once("POST", f"{root}/tokenize", body)
        except (Error, PassingError):
            return
        theirs, ours = answer.get("tokens"), tokenizer.encode(_SAMPLE)
        if isinstance(theirs, list) and theirs != ours:
            what = f"has another tokenizer: it makes {len(theirs)} ids of a sentence, the data's tokenizer {len(ours)}"
            if len(theirs) == len(ours):
                what = "has another tokenizer: it makes other ids of a sentence than the data's"
            raise Error(what, where=self.url, fix="make the data set with the teacher's tokenizer")


def _spans(documents: Tensor) -> list[tuple[int, int]]:
    """First token, and the one after the last, of each document in a row [T]; padding is left out."""
    edges = torch.nonzero(documents[1:] != documents[:-1]).flatten().add(1).tolist()
    cuts = [0, *edges, len(documents)]
    return [(a, b) for a, b in pairwise(cuts) if int(documents[a]) >= 0]
