"""One program that runs a model, in a process of its own: gemstill, llama.cpp, ik_llama.cpp or transformers.

    python runners.py PROGRAM MODEL [SETTING=VALUE ...]

It loads the model, then answers each line of standard input, a JSON object, by a line of standard output:
{"job": "prefill", "tokens": n} -> seconds until the last of n tokens has its logits, from an empty cache;
{"job": "decode", "context": n, "tokens": m, "batch": b} -> seconds of m greedy steps of b texts behind n tokens each;
{"job": "memory"} -> peak resident bytes above the process with its libraries imported.
The prompts are random tokens, the same for every program.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 255_000  # tokens are drawn below it
ENOUGH = 8448  # tokens that a cache has room for


def prompt(tokens: int, seed: int = 0) -> list[int]:
    return [2, *(random.Random(seed).randrange(300, VOCAB) for _ in range(tokens - 1))]


class Llama:
    """llama.cpp by its C interface, which both packages give; `package` is llama_cpp or ik_llama_cpp."""

    def __init__(self, package: str, threads: int, flash: bool) -> None:
        own = package == "llama_cpp"
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp" if own else f"{package}._ctypes_api")
        self.own, self.threads, self.flash = own, threads, flash
        if own:
            # Its log, thousands of lines, is not this program's.
            self.quiet = self.api.llama_log_callback(lambda *_: None)
            self.api.llama_log_set(self.quiet, ctypes.c_void_p())
        self.api.llama_backend_init()

    def load(self, path: str) -> None:
        api = self.api
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        vocab = api.llama_model_get_vocab(self.model)
        self.vocab = api.llama_vocab_n_tokens(vocab)
        self.context: Any = None
        self.size = (0, 0)

    def _open(self, tokens: int, batch: int) -> None:
        """A context of the size that the job wants, as a user would open it, and empty."""
        api = self.api
        if self.size != (tokens, batch):
            if self.context is not None:
                api.llama_free(self.context)
            params = api.llama_context_default_params()
            params.n_ctx, params.n_seq_max = tokens * batch, batch
            params.n_batch = max(2048, batch)
            params.n_threads = params.n_threads_batch = self.threads
            if self.own:
                params.flash_attn_type = 1 if self.flash else 0
                params.kv_unified = False
            else:
                params.flash_attn = self.flash
            self.context = api.llama_init_from_model(self.model, params)
            self.size = (tokens, batch)
        if self.own:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
        else:
            api.llama_kv_cache_clear(self.context)

    def _feed(self, rows: list[tuple[int, int, int]], last: set[int]) -> None:
        """Rows of (token, position, sequence); logits for those whose number is in `last`."""
        api = self.api
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            batch = api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (token, position, sequence) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = start + i in last
            if api.llama_decode(self.context, batch):
                raise SystemExit("llama_decode failed")
            api.llama_batch_free(batch)

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())

    def prefill(self, tokens: int) -> float:
        ids = prompt(tokens)
        self._open(tokens + 64, 1)
        begin = time.perf_counter()
        self._feed([(token, at, 0) for at, token in enumerate(ids)], {tokens - 1})
        self._likeliest(-1)
        return time.perf_counter() - begin

    def decode(self, context: int, tokens: int, batch: int) -> float:
        self._open(context + tokens + 64, batch)
        for text in range(batch):
            ids = prompt(context, text)
            self._feed([(token, at, text) for at, token in enumerate(ids)], {context - 1})
        following = [2 + text for text in range(batch)]
        begin = time.perf_counter()
        for at in range(context, context + tokens):
            self._feed([(token, at, text) for text, token in enumerate(following)], set(range(batch)))
            following = [self._likeliest(text) for text in range(batch)]
        return time.perf_counter() - begin


class Transformers:
    """transformers; attention eager or sdpa, cache dynamic, or static with the step compiled."""

    def __init__(self, dtype: str, attention: str, static: bool) -> None:
        self.torch, self.transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        self.dtype, self.attention, self.static = getattr(self.torch, dtype), attention, static

    def load(self, path: str) -> None:
        self.model = self.transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=self.dtype, attn_implementation=self.attention
        ).eval()
        self.step = self.torch.compile(self.model.forward, dynamic=False) if self.static else self.model.forward

    def _cache(self, batch: int, room: int) -> Any:
        config = self.model.config
        return self.transformers.StaticCache(config, max_cache_len=room) if self.static else None

    def _feed(self, forward: Any, ids: Any, cache: Any, at: int) -> tuple[Any, Any]:
        torch = self.torch
        where = torch.arange(at, at + ids.shape[1])
        with torch.inference_mode():
            out = forward(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, cache_position=where,
                position_ids=where[None].expand(len(ids), -1),
            )  # fmt: skip
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def prefill(self, tokens: int) -> float:
        ids = self.torch.tensor([prompt(tokens)])
        cache = self._cache(1, tokens + 64)
        begin = time.perf_counter()
        self._feed(self.model.forward, ids, cache, 0)
        return time.perf_counter() - begin

    def decode(self, context: int, tokens: int, batch: int) -> float:
        ids = self.torch.tensor([prompt(context, text) for text in range(batch)])
        following, cache = self._feed(self.model.forward, ids, self._cache(batch, context + tokens + 64), 0)
        following, cache = self._feed(self.step, following, cache, context)  # compiles
        begin = time.perf_counter()
        for at in range(context + 1, context + tokens + 1):
            following, cache = self._feed(self.step, following, cache, at)
        return time.perf_counter() - begin


class Ours:
    """gemstill's engine, greedy; `quantize` as `gemstill.load` has it, "file" for a file's own blocks."""

    def __init__(self, quantize: str) -> None:
        self.gemstill: Any = importlib.import_module("gemstill")
        self.engine: Any = importlib.import_module("gemstill.infer.engine")
        self.request: Any = importlib.import_module("gemstill.infer.request")
        for name in ("checkpoint.source", "checkpoint.gguf"):
            importlib.import_module(f"gemstill.{name}")
        self.quantize = quantize

    def load(self, path: str) -> None:
        how = {"quantize": self.quantize} if self.quantize else {}
        self.model, _ = self.gemstill.load(path, **how)

    def prefill(self, tokens: int) -> float:
        engine = self.engine.Engine(self.model, slots=1, context=tokens + 64)
        request = self.request.Request(prompt(tokens), max_new_tokens=1)
        begin = time.perf_counter()
        engine.run([request])
        return time.perf_counter() - begin

    def decode(self, context: int, tokens: int, batch: int) -> float:
        engine = self.engine.Engine(self.model, slots=batch, context=context + tokens + 64)
        more = tokens + 64  # the first text goes on while the others are read
        requests = [self.request.Request(prompt(context, text), max_new_tokens=more) for text in range(batch)]
        answers = [engine.submit(request) for request in requests]
        while not all(answer.tokens for answer in answers):
            engine.step()
        begin = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = time.perf_counter() - begin
        if any(answer.error or len(answer.tokens) <= tokens for answer in answers):
            raise SystemExit(f"an answer ended early: {[answer.ended for answer in answers]}")
        return seconds


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(program: str, model: str, *settings: str) -> None:
    set_ = dict(item.split("=", 1) for item in settings)
    threads = int(set_.get("threads", os.cpu_count() or 1))
    if program in ("llama_cpp", "ik_llama_cpp"):
        runner: Any = Llama(program, threads, set_.get("flash", "0") == "1")
    elif program == "transformers":
        runner = Transformers(set_["dtype"], set_["attention"], set_.get("static", "0") == "1")
    else:
        runner = Ours(set_.get("quantize", ""))
    imported = resident("VmRSS")
    begin = time.perf_counter()
    runner.load(model)
    print(json.dumps({"loaded": time.perf_counter() - begin}), flush=True)
    jobs: dict[str, Callable[..., float]] = {"prefill": runner.prefill, "decode": runner.decode}
    for line in sys.stdin:
        job = json.loads(line)
        name = job.pop("job")
        result = float(resident("VmHWM") - imported) if name == "memory" else jobs[name](**job)
        print(json.dumps({"result": result}), flush=True)


class Runner:
    """A process of `main`, asked from another one."""

    def __init__(self, program: str, model: Path, **settings: object) -> None:
        python = str(settings.pop("python", sys.executable))
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [python, __file__, program, str(model), *words]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.load_seconds = float(self._answer()["loaded"])

    def ask(self, job: str, **more: int) -> float:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"job": job} | more) + "\n")
        self.child.stdin.flush()
        return float(self._answer()["result"])

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"a program ended: {self.child.args}")

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
