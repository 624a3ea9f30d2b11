"""An OpenAI-compatible server as we ask one: patiently, and with one clear line where patience does not help.

What may pass (no connection, 408, 429, 5xx, half an answer) is tried again with growing pauses; what does not is an
Error. The key is read from GEMSTILL_API_KEY.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gemstill.core.errors import Error

KEY = "GEMSTILL_API_KEY"  # the environment's variable with a server's key
AT_ONCE = 16  # requests under way
TRIES, PAUSE, LONGEST = 10, 0.5, 30.0  # times that a request is made; seconds of the first pause, and of any
TIMEOUT = 600.0  # seconds for one answer
LARGEST = 1 << 28  # bytes of an answer, unpacked: more than any is of use
_PASSING = (408, 425, 429, 500, 502, 503, 504)

T = TypeVar("T")


class PassingError(Exception):
    """Something that may be over at the next try. after: seconds that the server asks to wait."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


class Server:
    """One model of a server. url: ".../v1". name: of the model. Use `open`.

    mend: from the reason that the server gives for a refusal to what helps.
    """

    def __init__(self, url: str, name: str, mend: Callable[[str], str] = lambda _: "look at the server") -> None:
        self.url, self.name, self._mend = url.rstrip("/"), name, mend
        self.over = threading.Event()  # one request has failed for good: others stop trying
        httpx, key = _library(), os.environ.get(KEY, "").strip()
        if not key.isascii() or not key.isprintable():
            raise Error("holds what no key does", where=KEY, fix="set it again, without line breaks and accents")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
        self._client = httpx.Client(headers=headers, limits=limits, timeout=httpx.Timeout(TIMEOUT, connect=10.0))

    @staticmethod
    def open(place: str, mend: Callable[[str], str] = lambda _: "look at the server") -> Server:
        """Reach the server at "http://host:8000/v1#model"; without a name, its only model is taken.

        Raises:
            Error: it cannot be reached, refuses, or has no such model.
        """
        url, _, wanted = place.partition("#")
        if not _is_address(url, wanted):
            raise Error("is no address of a server", where=f"{place:.200}", fix="write http://host:8000/v1#model")
        server = Server(url, wanted, mend)
        answer = server.ask("GET", "/models", None, lambda answer: answer, tries=2)  # a wrong address is told at once
        listed = answer.get("data")
        models = [
            item["id"]
            for item in (listed if isinstance(listed, list) else [])
            if isinstance(item, dict) and isinstance(item.get("id"), str) and _is_text(item["id"])
        ]
        if not wanted and len(models) == 1:
            server.name = models[0]
        elif not models:
            raise Error("names no model that it serves", where=url, fix="look at the server")
        elif wanted not in models:
            what = f"has no model '{wanted}'" if wanted else "serves several models"
            raise Error(what, where=url, fix=f"name one of these after a #: {', '.join(models)}")
        return server

    def ask(self, method: str, path: str, body: Any, read: Callable[[dict[str, Any]], T], tries: int = 0) -> T:
        """An answer, as `read` reads it, tried again while what fails may pass; `tries` times at most, 0 for TRIES.

        read: may raise PassingError and Error.

        Raises:
            Error: what does not pass, or what failed so many times.
        """
        pause, tries = PAUSE, tries or TRIES
        for attempt in range(1, tries + 1):
            try:
                return read(self.once(method, self.url + path, body))
            except PassingError as error:
                if attempt == tries:
                    fix = "look at the server; the same command goes on with what is missing"
                    raise Error(f"{error}, {tries} times in a row", where=self.url, fix=fix) from error
                # Not all at the same moment again.
                if self.over.wait(min(LONGEST, max(error.after, pause * random.uniform(0.5, 1.0)))):
                    raise Error(str(error), where=self.url) from error  # another request has given up
                pause *= 2
        raise AssertionError

    def once(self, method: str, url: str, body: Any) -> dict[str, Any]:
        """One request's answer. Raises PassingError for what may pass, Error for what does not."""
        httpx = _library()
        try:
            with self._client.stream(method, url, json=body) as response:
                data = self._read(response)
        except (httpx.TransportError, httpx.DecodingError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PassingError(f"cannot be reached ({reason:.200})") from error
        code, reason = response.status_code, _reason(data) or response.reason_phrase
        if code in _PASSING:
            raise PassingError(f"answers {code} ({reason})", _seconds(response.headers))
        if code in (401, 403):
            raise Error(f"answers {code} ({reason})", where=self.url, fix=f"set {KEY} to the server's key")
        if not 200 <= code < 300:
            raise Error(f"answers {code} ({reason})", where=self.url, fix=self._mend(reason))
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PassingError("gives half an answer (no JSON)") from error
        if not isinstance(answer, dict):
            raise PassingError("gives half an answer (no JSON object)")
        return answer

    def _read(self, response: Any) -> bytes:
        """The body. Raises Error for one that would fill the memory."""
        data = bytearray()
        for part in response.iter_bytes():
            data += part
            if len(data) > LARGEST:
                what = f"gives an answer of more than {LARGEST >> 20} MiB"
                raise Error(what, where=self.url, fix="look at the server")
        return bytes(data)


def _is_address(url: str, name: str) -> bool:
    """Whether this is the address of a server, and the name of a model."""
    httpx = _library()
    try:
        parts, host = urlsplit(url), httpx.URL(url).host
        host.encode("idna")
        return parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and _is_text(name)
    except (ValueError, httpx.InvalidURL):  # a port that is no number, half an IPv6 address, a name too long
        return False


def _is_text(name: str) -> bool:
    """Whether this can be sent: no half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _library() -> Any:
    try:
        import httpx2
    except ImportError as error:
        what = f"a server is asked by httpx2, which cannot be imported ({error})"
        raise Error(what, where="server", fix="pip install 'gemstill[server]'") from error
    return httpx2


def _reason(data: bytes) -> str:
    """What a server says of its refusal, in a few words."""
    text: Any = data.decode(errors="replace")
    try:
        text = json.loads(text)
        text = text.get("error", text)
        text = text.get("message", text) if isinstance(text, dict) else text
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(str(text).split())[:200]


def _seconds(headers: Any) -> float:
    try:
        after = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return after if math.isfinite(after) else 0.0
