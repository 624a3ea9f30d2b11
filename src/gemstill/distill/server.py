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
import json
import math
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.target import Target
from gemstill.text.tokenizer import Tokenizer

KEY = "GEMSTILL_API_KEY"  # the environment's variable with a server's key
AT_ONCE = 16  # requests under way
TRIES, PAUSE, LONGEST = 10, 0.5, 30.0  # times that a request is made; seconds of the first pause, and of any
TIMEOUT = 600.0  # seconds for one answer
_TOKEN = "token_id:"
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_SAMPLE = "The teacher's tokenizer, asked: 1234.5 + 67 = ?\n\tdéjà vu, naïve façade — 東京 🙂 def f(x): return x**2"
_VLLM = "serve the model with vLLM, whose /v1/completions knows prompt_logprobs"


class _PassingError(Exception):
    """Something that may be over at the next try. after: seconds that the server asks to wait."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


class ServerTeacher:
    """A server's model as a teacher of its `entries` likeliest entries. Use `open`."""

    licence, precision, vocab_size, sparse = "unknown", "unknown", None, True

    def __init__(self, url: str, name: str, entries: int) -> None:
        """url: ".../v1". name: of the model, as the server calls it."""
        self.url, self.name, self.entries = url.rstrip("/"), name, entries
        self.echo = False  # the form to ask in
        self.fingerprint = hashlib.sha256(f"server/{name}".encode()).hexdigest()
        self._client = _client(url)
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="teacher")
        self._over = threading.Event()  # one request has failed for good

    @staticmethod
    def open(place: str, tokenizer: Tokenizer, entries: int) -> ServerTeacher:
        """Reach the server at "http://host:8000/v1#model" and see that it is of use.

        Without a name, its only model is taken. The key is read from GEMSTILL_API_KEY.

        Raises:
            Error: it cannot be reached, refuses, has no such model, tells no log-probabilities of prompts or not so
                many, or has another tokenizer.
        """
        url, _, wanted = place.partition("#")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise Error("is no address of a server", where=place, fix="write http://host:8000/v1#model")
        teacher = ServerTeacher(url, wanted, entries)
        answer = teacher._patiently("GET", "/models", None, tries=2)  # a wrong address is told at once
        models = [str(item.get("id")) for item in answer.get("data", []) if isinstance(item, dict)]
        if not wanted and len(models) == 1:
            teacher = ServerTeacher(url, models[0], entries)
        elif wanted not in models:
            what = f"has no model '{wanted}'" if wanted else "serves several models"
            raise Error(what, where=url, fix=f"name one of these after a #: {', '.join(models) or 'none'}")
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
        self._over.clear()
        jobs = [self._pool.submit(self._piece, prompt) for prompt in prompts]
        try:
            for (row, start, _), job in zip(pieces, jobs, strict=True):
                for at, entries in enumerate(job.result(), row * width + start):
                    ids, logprobs = zip(*entries, strict=True)
                    target.ids[at, : len(ids)] = torch.tensor(ids)
                    target.probs[at, : len(ids)] = torch.tensor(logprobs, dtype=torch.float64).exp().float()
        except BaseException:
            self._over.set()
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
        found: list[list[tuple[int, float]]] = self._patiently(
            "POST", "/completions", body, lambda answer: self._entries(answer, len(asked))
        )
        return found

    def _entries(self, answer: dict[str, Any], length: int) -> list[list[tuple[int, float]]]:
        """The entries in the places 1 … length − 1 of a prompt. Raises _PassingError for half an answer."""
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
            raise _PassingError(f"gives half an answer ({type(error).__name__}: {error})") from error
        if len(found) != length - 1 or not all(found):
            raise _PassingError(f"gives half an answer ({len(found)} places of {length - 1})")
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
            answer = self._once("POST", f"{root}/tokenize", body)
        except (Error, _PassingError):
            return
        theirs, ours = answer.get("tokens"), tokenizer.encode(_SAMPLE)
        if isinstance(theirs, list) and theirs != ours:
            what = f"has another tokenizer: it makes {len(theirs)} ids of a sentence, the data's tokenizer {len(ours)}"
            if len(theirs) == len(ours):
                what = "has another tokenizer: it makes other ids of a sentence than the data's"
            raise Error(what, where=self.url, fix="make the data set with the teacher's tokenizer")

    def _patiently(self, method: str, path: str, body: Any, read: Any = None, tries: int = 0) -> Any:
        """An answer, as `read` reads it, tried again while what fails may pass."""
        pause, tries = PAUSE, tries or TRIES
        for attempt in range(1, tries + 1):
            try:
                answer = self._once(method, self.url + path, body)
                return answer if read is None else read(answer)
            except _PassingError as error:
                if attempt == tries:
                    fix = "look at the server; the same command goes on after the last whole block"
                    raise Error(f"{error}, {tries} times in a row", where=self.url, fix=fix) from error
                # Not all at the same moment again.
                if self._over.wait(min(LONGEST, max(error.after, pause * random.uniform(0.5, 1.0)))):
                    raise Error(str(error), where=self.url) from error  # another request has given up
                pause *= 2
        raise AssertionError

    def _once(self, method: str, url: str, body: Any) -> dict[str, Any]:
        """One request's answer. Raises _PassingError for what may pass, Error for what does not."""
        httpx = _library()
        try:
            response = self._client.request(method, url, json=body)
        except httpx.TransportError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise _PassingError(f"cannot be reached ({reason:.200})") from error
        if response.status_code in _PASSING:
            raise _PassingError(f"answers {response.status_code} ({_reason(response)})", _seconds(response.headers))
        if response.status_code in (401, 403):
            fix = f"set {KEY} to the server's key"
            raise Error(f"answers {response.status_code} ({_reason(response)})", where=self.url, fix=fix)
        if response.status_code >= 400:
            reason = _reason(response)
            fix = (
                f"start the server with --max-logprobs {self.entries}" if "logprobs" in reason else "look at the server"
            )
            raise Error(f"answers {response.status_code} ({reason})", where=self.url, fix=fix)
        try:
            answer = response.json()
        except ValueError as error:
            raise _PassingError("gives half an answer (no JSON)") from error
        if not isinstance(answer, dict):
            raise _PassingError("gives half an answer (no JSON object)")
        return answer


def _library() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise Error(f"a server is asked by httpx2, which cannot be imported ({error})", where="teacher",
                    fix="pip install 'gemstill[server]'") from error  # fmt: skip
    return httpx2


def _client(url: str) -> Any:
    httpx, key = _library(), os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    return httpx.Client(headers=headers, limits=limits, timeout=httpx.Timeout(TIMEOUT, connect=10.0))


def _spans(documents: Tensor) -> list[tuple[int, int]]:
    """First token, and the one after the last, of each document in a row [T]; padding is left out."""
    edges = torch.nonzero(documents[1:] != documents[:-1]).flatten().add(1).tolist()
    cuts = [0, *edges, len(documents)]
    return [(a, b) for a, b in pairwise(cuts) if int(documents[a]) >= 0]


def _reason(response: Any) -> str:
    """What a server says of its refusal, in a few words."""
    text: Any = response.text
    try:
        text = json.loads(text)
        text = text.get("error", text)
        text = text.get("message", text) if isinstance(text, dict) else text
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:200] or str(response.reason_phrase)


def _seconds(headers: Any) -> float:
    try:
        after = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return after if math.isfinite(after) else 0.0
