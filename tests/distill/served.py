"""A real HTTP server around a model: it answers as vLLM's OpenAI-compatible one does, and fails where told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from gemstill.text.tokenizer import Tokenizer

Fault = Callable[["Handler", dict[str, Any]], bool]


class Served:
    """The server; use as a context. faults: tried in turn, one a completion, until none is left."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, name: str = "tiny/model", *, form: str = "vllm",
                 key: str = "", most: int = 20, together: int = 1) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name, self.form = model, tokenizer, name, form
        self.key, self.most = key, most
        self.together = threading.Barrier(together)
        self.faults: list[Fault | None] = []
        self.completions = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Served:
        handler = type("Bound", (Handler,), {"served": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1#{self.name}"

    def logprobs(self, prompt: list[int]) -> torch.Tensor:
        """What the model says after each token, [T, V]; one request at a time, as torch has few threads."""
        with self.lock, torch.inference_mode():
            return self.model(torch.tensor([prompt]))[0, :, : self.tokenizer.vocab_size].log_softmax(-1)


class Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.answer({"error": {"message": message, "type": "BadRequestError", "code": status}}, status, headers)

    def allowed(self) -> bool:
        if self.served.key and self.headers.get("Authorization") != f"Bearer {self.served.key}":
            self.refuse(401, "Unauthorized")
            return False
        return True

    def do_GET(self) -> None:
        if self.allowed():
            self.answer({"object": "list", "data": [{"id": self.served.name, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        if self.path == "/tokenize":
            ids = self.served.tokenizer.encode(body["prompt"])
            self.answer({"count": len(ids), "max_model_len": 512, "tokens": ids})
            return
        assert self.path == "/v1/completions"
        with self.served.lock:
            self.served.completions += 1
            fault = self.served.faults.pop(0) if self.served.faults else None
        if not self.served.together.broken and self.served.together.parties > 1:
            self.served.together.wait(timeout=20)
        content = self.completion(body)
        if content is not None and not (fault and fault(self, content)):
            self.answer(content)

    def completion(self, body: dict[str, Any]) -> dict[str, Any] | None:
        served, prompt = self.served, body["prompt"]
        k = body.get("prompt_logprobs" if served.form == "vllm" else "logprobs")
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if k is not None and k > served.most:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {served.most}"
            self.refuse(400, message)
            return None
        if k is not None and served.form == "vllm":
            choice["prompt_logprobs"] = [None, *self.places(prompt, k)]
        elif k is not None and served.form in ("echo", "text") and body.get("echo"):
            spell = (lambda n: f"token_id:{n}") if served.form == "echo" else (lambda n: served.tokenizer.decode([n]))
            top = [{spell(int(n)): entry["logprob"] for n, entry in place.items()} for place in self.places(prompt, k)]
            choice["logprobs"] = {"tokens": [spell(n) for n in prompt], "top_logprobs": [None, *top, {spell(0): -1.0}]}
        return {"id": "cmpl-1", "object": "text_completion", "model": served.name, "choices": [choice]}

    def places(self, prompt: list[int], k: int) -> list[dict[str, Any]]:
        """The k likeliest in each place after the first, and, as vLLM has it, the token that stands there."""
        found = []
        for row, token in zip(self.served.logprobs(prompt)[:-1], prompt[1:], strict=True):
            order = row.argsort(descending=True).tolist()
            spell = self.served.tokenizer.decode
            entries: dict[int, dict[str, Any]] = {
                n: {"logprob": float(row[n]), "rank": rank, "decoded_token": spell([n])}
                for rank, n in enumerate(order[:k], 1)
            }
            entries.setdefault(token, {"logprob": float(row[token]), "rank": order.index(token) + 1})
            found.append({str(n): entry for n, entry in entries.items()})
        return found


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    """Refuse with a status."""

    def fault(handler: Handler, _: dict[str, Any]) -> bool:
        handler.refuse(code, f"fault {code}", headers)
        return True

    return fault


def hang_up(handler: Handler, _: dict[str, Any]) -> bool:
    """Close the connection without an answer."""
    handler.close_connection = True
    return True


def half(handler: Handler, content: dict[str, Any]) -> bool:
    """Half of the bytes that were announced."""
    data = json.dumps(content).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True
    return True


def half_json(handler: Handler, content: dict[str, Any]) -> bool:
    """JSON that breaks off."""
    handler.answer(json.dumps(content).encode()[:-40])
    return True


def short(handler: Handler, content: dict[str, Any]) -> bool:
    """Fewer places than the prompt has."""
    content["choices"][0]["prompt_logprobs"].pop()
    return False
