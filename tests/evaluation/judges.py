"""An OpenAI-compatible server that judges by a rule of the test's, and fails where told to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], str]  # from request and answer to what the judge writes


class JudgeServer:
    """The server; use as a context. questions: what it was asked. status: of its answers to them."""

    def __init__(self, rule: Rule, name: str = "the/judge") -> None:
        self.rule, self.name = rule, name
        self.questions: list[str] = []
        self.status = 200

    def __enter__(self) -> JudgeServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"judge": self}))
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1#{self.name}"


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": self.judge.name}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        question = body["messages"][-1]["content"]
        self.judge.questions.append(question)
        request, answer = (
            re.search(f"<{tag}>\n(.*?)\n</{tag}>", question, re.DOTALL)[1] for tag in ("request", "answer")
        )
        message = {"role": "assistant", "content": self.judge.rule(request, answer)}
        self._answer({"model": body["model"], "choices": [{"index": 0, "message": message}]}, self.judge.status)


def _within(tag: str, question: str) -> str:
    found = re.search(f"<{tag}>\n(.*?)\n</{tag}>", question, re.DOTALL)
    assert found
    return found[1]
