"""The loss over 256,000 entries: against its own matrix products, plain PyTorch, torch's fused loss, and other kernels.

Everything runs in the machine's fast precision: hidden states and head in it, gradients to both. `products` are the
job's matrix products back to back, written into memory that is there already (freed memory is kept for all, as in a
training run, which clears no page twice): three of the student's, one of an
online teacher's. plain is F.linear, cap, log_softmax, gather. torch is torch.nn.functional.linear_cross_entropy;
--full tries its chunked form too, which takes minutes. Other kernels that run on a CPU take part at --peer-tokens:
TRL's chunked divergence, orda-kernel's torch back end, Axolotl's chunked top-k loss (on Liger's base class).
`--parts hard,sparse,online,large,peers,memory` chooses; all of them take a quarter of an hour. `sampled`, with
--model (a GGUF file or folder of real weights), measures the sampled backward on its hidden states over prose.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Row, alternate, arguments, compare, finish, peak_bytes
from gemstill.core.allocator import keep_freed_memory
from gemstill.core.machine import fast_dtype
from gemstill.ops.loss import linear_cross_entropy
from gemstill.ops.target import OnlineTarget, Target

SOFTCAP, ENTRIES = 30.0, 12
Job = Callable[[], Any]

# The same in every child whose memory is measured.
SETUP = """
import torch
from distill_loss import *
torch.manual_seed(0)
here = Case({vocab}, {width}, {tokens}, {dtype})
"""


class Case:
    """One size: hidden states and heads of both sides, targets of every kind, and what is done with them."""

    def __init__(self, vocab: int, width: int, tokens: int, dtype: torch.dtype) -> None:
        self.head = torch.empty(vocab, width, dtype=dtype).normal_().requires_grad_()
        self.hidden = (torch.randn(tokens, width) / width**0.5).to(dtype).requires_grad_()
        self.theirs = (torch.randn(tokens, width) / width**0.5).to(dtype)
        self.labels = torch.randint(vocab, (tokens,))
        probs = torch.rand(tokens, ENTRIES).softmax(1)
        self.sparse = Target(torch.randint(vocab, (tokens, ENTRIES)), probs, torch.ones(tokens))
        # The teacher's head is the student's, as far as memory goes; its products are its own.
        self.online = OnlineTarget(self.theirs, self.head.detach(), SOFTCAP, 1.0, torch.ones(tokens))

    def learn(self, loss: Tensor) -> None:
        """Backward; the gradients are let go before the next turn, as an optimizer does."""
        loss.backward()
        self.hidden.grad = self.head.grad = None

    def ours(self, target: Target | OnlineTarget, **options: Any) -> None:
        self.learn(linear_cross_entropy(self.hidden, self.head, target, **options))

    def torchs(self, options: Any) -> None:
        self.learn(F.linear_cross_entropy(self.hidden, self.head, self.labels, reduction="sum", options=options))

    def plain(self, *, online: bool = False) -> None:
        log_q = self._log_softmax(self.hidden, self.head)
        if online:
            with torch.no_grad():
                p = self._log_softmax(self.theirs, self.online.head).exp()
            self.learn(-(p * log_q).sum())
        else:
            self.learn(-(self.sparse.probs * log_q.gather(1, self.sparse.ids)).sum())

    def _log_softmax(self, hidden: Tensor, head: Tensor) -> Tensor:
        z = F.linear(hidden, head).float()
        return (SOFTCAP * torch.tanh(z / SOFTCAP)).log_softmax(1)

    def products(self, *, teacher: bool = False) -> Job:
        x, w = self.hidden.detach(), self.head.detach()
        raw = torch.zeros(len(x), len(w), dtype=x.dtype)
        d_hidden, d_head = torch.zeros_like(x), torch.zeros_like(w)

        def run() -> None:
            if teacher:
                torch.mm(self.theirs, w.T, out=raw)
            torch.mm(x, w.T, out=raw)
            torch.mm(raw, w, out=d_hidden)
            torch.mm(raw.T, x, out=d_head)

        return run

    # What the other kernels make of the same.

    def trl(self) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        result = ChunkedDivergenceFunction.apply(
            self.hidden, self.head, None, self.theirs, self.online.head, None, 0.0, 1.0, 1.0, SOFTCAP, 1.0, SOFTCAP
        )
        self.learn(result[0].sum())

    def orda(self) -> None:
        from orda_kernel import SeparateTeacher, distillation_loss

        teacher = SeparateTeacher(hidden=self.theirs, weight=self.online.head)
        settings = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0, "backend": "torch"}
        self.learn(distillation_loss(self.hidden, self.head, self.labels, teacher, reduction="sum", **settings).loss)

    def axolotl(self) -> None:
        from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobFunction

        ids, probs, _ = self.sparse
        loss = LigerFusedLinearKLTopKLogprobFunction.apply(
            self.hidden[None], self.head, ids[None], probs.log()[None], torch.ones_like(ids, dtype=torch.bool)[None],
            self.labels[None], None, 0.0, 1.0, -100, 1.0, 0.0, False, 1024, False, False,
        )  # fmt: skip
        self.learn(loss)


def timed(job: Job) -> Callable[[], float]:
    def run() -> float:
        gc.collect()
        start = time.perf_counter()
        job()
        return time.perf_counter() - start

    return run


def measure(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    return alternate({name: timed(job) for name, job in jobs.items()}, rounds=rounds)


def against(name: str, found: dict[str, list[float]], peer: str, bar: float | None) -> Row:
    # A share of the products themselves has no further limit.
    limit = statistics.median(found["products"]) if "products" in found and peer != "products" else None
    return compare(name, found["ours"], found[peer], "s", bar=bar, small=True, limit=limit)


def hard(case: Case, rounds: int, full: bool) -> list[Row]:
    target = Target.hard(case.labels)
    chunked = torch.nn.LinearCrossEntropyOptions()
    jobs: dict[str, Job] = {"ours": functools.partial(case.ours, target), "products": case.products()}
    forms = {"default": None, "chunked": chunked} if full else {"default": None}
    # One call of each form finds the faster (the chunked one takes minutes); only that is then alternated.
    once = {name: timed(functools.partial(case.torchs, options))() for name, options in forms.items()}
    best = min(once, key=lambda name: once[name])
    print("torch's forms, one call each:", {name: round(value, 2) for name, value in once.items()}, flush=True)
    jobs["torch"] = functools.partial(case.torchs, forms[best])
    found = measure(jobs, rounds)
    return [
        against("hard / products", found, "products", 1.12),
        against(f"hard / torch {torch.__version__} linear_cross_entropy, {best} form", found, "torch", 1.0),
    ]


def sparse(case: Case, rounds: int, quick: bool) -> list[Row]:
    jobs: dict[str, Job] = {
        "ours": functools.partial(case.ours, case.sparse, softcap=SOFTCAP),
        "products": case.products(),
        "plain": case.plain,
    }
    found = measure(jobs, rounds)
    return [
        against("sparse, soft cap / products", found, "products", 1.12),
        against("sparse, soft cap / plain PyTorch", found, "plain", 0.5 if quick else 0.95),
    ]


def online(case: Case, rounds: int) -> list[Row]:
    jobs: dict[str, Job] = {
        "ours": functools.partial(case.ours, case.online, softcap=SOFTCAP),
        "products": case.products(teacher=True),
    }
    return [against("online / products", measure(jobs, rounds), "products", 1.15)]


def large(vocab: int, width: int, dtype: torch.dtype, tokens: int) -> list[Row]:
    case = Case(vocab, width, tokens, dtype)
    rows = []
    for name, target in (("sparse", case.sparse), ("online", case.online)):
        spent = timed(functools.partial(case.ours, target, softcap=SOFTCAP))()
        rows.append(compare(f"{name}, {tokens} tokens", [1e3 * spent / tokens], None, "ms/token"))
    return rows


def peers(case: Case, rounds: int) -> list[Row]:
    """Each against ours of the same job; one that cannot run is named with its reason."""
    rows = []
    kinds = {"trl": ("online", "trl"), "orda": ("online", "orda-kernel"), "axolotl": ("sparse", "axolotl")}
    for name, (kind, package) in kinds.items():
        job = getattr(case, name)
        target = case.online if kind == "online" else case.sparse
        cap = None if name in ("orda", "axolotl") else SOFTCAP  # they have none
        try:
            job()
        except Exception as error:  # any reason is one to tell
            print(
                f"{package} does not run here: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True
            )
            continue
        teacher = target._replace(softcap=cap) if kind == "online" else target
        found = measure({"ours": functools.partial(case.ours, teacher, softcap=cap), "peer": job}, rounds)
        label = f"{kind}, {len(case.hidden)} tokens / {package} {version(package)}"
        rows.append(against(label, found, "peer", 1.0))
    return rows


def sampled(model: str, tokens: int, rounds: int, dtype: torch.dtype) -> list[Row]:
    """On a trained model's hidden states, and on an untrained one's of the same size."""
    import gemstill

    network, tokenizer = gemstill.load(model, dtype=dtype)
    text = "\n\n".join(topics[name] for name in ("objects", "execmodel", "exceptions", "import", "class", "types"))
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])[None, : tokens + 1]
    with torch.no_grad():
        hidden, head, cap = network(ids[:, :-1], readout=lambda *given: given)
    case = Case(*head.shape, tokens, dtype)
    # The student is the model, and what it learns from the text: hard labels, its gradient as large as any.
    with torch.no_grad():
        case.hidden.copy_(hidden[0])
        case.head.copy_(head)
    target, rows = Target.hard(ids[0, 1:]), []
    for name, bar in (("trained", 0.55), ("untrained", None)):
        jobs: dict[str, Job] = {
            "ours": functools.partial(case.ours, target, softcap=cap, backward="sampled"),
            "exact": functools.partial(case.ours, target, softcap=cap),
            "products": case.products(),
        }
        found = measure(jobs, rounds)
        rows.append(against(f"sampled, {name} / products", found, "products", bar))
        rows.append(against(f"sampled, {name} / exact", found, "exact", 1.03))
        if name == "trained":
            rows += noise(case, target, cap)
            torch.nn.init.normal_(case.hidden.data, std=head.shape[1] ** -0.5)
    return rows


def noise(case: Case, target: Target, cap: float | None) -> list[Row]:
    """Root mean square over draws of the relative error of both gradients, in float32; and of the draws' mean."""
    draws, pair = 4, (case.hidden.detach().float(), case.head.detach().float())

    def gradients(**options: Any) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in pair]
        return list(torch.autograd.grad(linear_cross_entropy(*leaves, target, softcap=cap, **options), leaves))

    exact, rows = gradients(), []
    errors, total = [0.0, 0.0], [torch.zeros_like(x) for x in exact]
    for seed in range(draws):
        for i, x in enumerate(gradients(backward="sampled", seed=1000 * seed)):
            errors[i] += float((x - exact[i]).norm() / exact[i].norm()) ** 2 / draws
            total[i] += x / draws
    for name, error, mean, true in zip(("hidden", "head"), errors, total, exact, strict=True):
        rows.append(compare(f"sampled: noise of d {name}", [error**0.5], [1e-2], "relative", bar=1.0, small=True))
        left = float((mean - true).norm() / true.norm())
        # Without bias the mean of n draws is off by 1/√n of one draw's noise.
        label = f"sampled: mean of {draws} d {name}, / expected"
        rows.append(compare(label, [left], [(error / draws) ** 0.5], "relative", bar=1.15, small=True))
    return rows


def memory(vocab: int, width: int, tokens: int, dtype: torch.dtype) -> list[Row]:
    """Peak bytes above the inputs and two gradients: of ours in float32, of the others in the dtype that they make."""
    setup = SETUP.format(vocab=vocab, width=width, tokens=tokens, dtype=dtype)
    entries = (vocab + tokens) * width

    def above(code: str, bytes_each: int) -> float:
        return (peak_bytes(code, setup) - entries * bytes_each) / 2**20

    own = dtype.itemsize
    ours = above(f"here.ours(here.sparse, softcap={SOFTCAP})", 4)
    ours_online = above(f"here.ours(here.online, softcap={SOFTCAP})", 4)
    plain, plain_online = above("here.plain()", own), above("here.plain(online=True)", own)
    return [
        compare("memory: sparse / plain PyTorch", [ours], [plain], "MiB", bar=0.1, small=True),
        compare("memory: online / plain PyTorch", [ours_online], [plain_online], "MiB"),
    ]


def peer_memory(vocab: int, width: int, tokens: int, dtype: torch.dtype) -> list[Row]:
    setup = SETUP.format(vocab=vocab, width=width, tokens=tokens, dtype=dtype)
    rows = []
    for name, kind in (("trl", "online"), ("orda", "online"), ("axolotl", "sparse")):
        try:
            theirs = peak_bytes(f"here.{name}()", setup)
        except Exception as error:  # told by `peers`
            print(f"{name}: {type(error).__name__}", flush=True)
            continue
        mine = peak_bytes(f"here.ours(here.{kind}, softcap={SOFTCAP})", setup)
        label = f"memory above inputs: {kind}, {tokens} tokens / {name}"
        rows.append(compare(label, [mine / 2**20], [theirs / 2**20], "MiB", bar=1.0, small=True))
    return rows


def main() -> None:
    args = arguments(
        __doc__, vocab=256_000, width=2304, tokens=1024, many=4096, peer_tokens=256, rounds=3, model="",
        parts="hard,sparse,online,large,peers,memory",
    )  # fmt: skip
    torch.manual_seed(0)
    keep_freed_memory()
    dtype = fast_dtype("cpu")
    parts = args.parts.split(",")
    rows: list[Row] = []
    size = (args.vocab, args.width)
    if {"hard", "sparse", "online"} & set(parts):
        case = Case(*size, args.tokens, dtype)
        if "hard" in parts:
            rows += hard(case, args.rounds, args.full)
        if "sparse" in parts:
            rows += sparse(case, args.rounds, dtype == torch.bfloat16)
        if "online" in parts:
            rows += online(case, args.rounds)
        del case
    if "large" in parts:
        rows += large(*size, dtype, args.many)
    if "peers" in parts:
        rows += peers(Case(*size, args.peer_tokens, dtype), 1 if not args.full else args.rounds)
    if "memory" in parts:
        rows += memory(*size, args.tokens, dtype)
        rows += peer_memory(*size, args.peer_tokens, dtype)
    if args.model:
        rows += sampled(args.model, args.tokens, args.rounds, dtype)
    finish(rows, dtype=str(dtype), vocab=args.vocab, width=args.width, tokens=args.tokens)


if __name__ == "__main__":
    main()
