"""What a server may answer besides an answer, each told in one line, from a real server on this machine."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gemstill.core import server
from gemstill.core.errors import Error
from gemstill.core.server import KEY, Server

MODELS = json.dumps({"data": [{"id": "a/model"}]}).encode()


class Broken(BaseHTTPRequestHandler):
    """Names its models, and answers every question with `body`."""

    status, body, models, head = 200, b"{}", MODELS, {}

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer(200, self.models, {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(self.status, self.body, self.head)

    def _answer(self, status: int, body: bytes, head: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | head).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Broken]]:
    monkeypatch.setattr(server, "PAUSE", 0.001)
    monkeypatch.setattr(server, "TRIES", 2)
    handler = type("Handler", (Broken,), {})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    handler.place = f"http://127.0.0.1:{http.server_port}/v1"
    yield handler
    http.shutdown()
    http.server_close()


DEEP = b"[" * 100_000
ANSWERS = {
    "401": (401, b'{"error": {"message": "no such key"}}', {}, f"answers 401 (no such key); set {KEY} to the"),
    "429": (429, b"{}", {"Retry-After": "nan"}, "answers 429 ({}), 2 times in a row; look at the server"),
    "500": (500, b"", {}, "answers 500 (Internal Server Error), 2 times in a row"),
    "500, deep": (500, DEEP, {}, "answers 500 ([[["),
    "400, deep": (400, DEEP, {}, "answers 400 ([[["),
    "another place": (302, b"", {"Location": "/v2"}, "answers 302 (Found); look at the server"),
    "deep": (200, DEEP, {}, "gives half an answer (no JSON), 2 times in a row"),
    "no JSON": (200, b"<html>", {}, "gives half an answer (no JSON), 2 times in a row"),
    "half": (200, b"{}", {"Content-Length": "9"}, "cannot be reached (peer closed connection"),
    "no gzip": (200, b"{}", {"Content-Encoding": "gzip"}, "cannot be reached (Error -3 while decompressing"),
    "huge": (200, gzip.compress(b" " * 3_000_000), {"Content-Encoding": "gzip"}, "gives an answer of more than 1 MiB"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_is_no_answer_is_told_in_one_line(
    broken: type[Broken], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(server, "LARGEST", 1 << 20)
    broken.status, broken.body, broken.head, said = ANSWERS[case]
    asked = Server.open(f"{broken.place}#a/model")
    with pytest.raises(Error) as caught:
        asked.ask("POST", "/chat/completions", {}, lambda answer: answer)
    assert str(caught.value).startswith(f"{broken.place}: {said}")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (b"{}", "names no model that it serves"),
        (b'{"data": 3}', "names no model that it serves"),
        (b'{"data": [1, {"id": [1]}, {"id": "\\ud800"}]}', "names no model that it serves"),
        (b'{"data": [{"id": "b"}, {"id": "c"}]}', "serves several models; name one of these after a #: b, c"),
    ],
)
def test_a_server_without_a_model_to_take(broken: type[Broken], models: bytes, said: str) -> None:
    broken.models = models
    with pytest.raises(Error, match=said):
        Server.open(broken.place)


@pytest.mark.parametrize(
    "place",
    [
        "file:///v1#a", "http://#a", "http://127.0.0.1:99999999/v1#a", "http://127.0.0.1:port/v1#a", "http://[::1/v1#a",
        "http://127.0.0.1\0/v1#a", f"http://{'a' * 70}.org/v1#a", "http://127.0.0.1/v1#\udcff",
    ],
)  # fmt: skip
def test_what_is_no_address(place: str) -> None:
    with pytest.raises(Error, match="is no address of a server; write http://host:8000/v1#model"):
        Server.open(place)


@pytest.mark.parametrize("key", ["a\nb", "é"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """httpx would put it into its message."""
    monkeypatch.setenv(KEY, key)
    with pytest.raises(Error, match=f"^{KEY}: holds what no key does") as caught:
        Server.open("http://127.0.0.1:9/v1#a")
    assert key not in str(caught.value)
