"""The training loop: it knows batches, an objective and a model, and nothing of what is learned."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.train.config import LoopConfig
from gemstill.train.heldout import Evaluation
from gemstill.train.metrics import Metrics
from gemstill.train.objective import Objective
from gemstill.train.optimizer import Optimizer
from gemstill.train.parallel import Ranks
from gemstill.train.schedule import factor
from gemstill.train.state import States


class Batches(Protocol):
    """Where batches come from: a function of the step alone, cut evenly over the ranks (gemstill.data.loader)."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Any:
        """This rank's part of the batch of `step`: a tuple or dataclass of tensors [B, …], `tokens` among them."""


@dataclass
class Loop:
    """One run of training. `run()` goes on from the last state in the run's folder and returns when all steps are done.

    model: float32 parameters on the run's device, sharded already where there are several ranks.
    config: with `steps`, `precision` and `compile` settled. evaluate: scores the model on held-out text.
    rate: operations a second that the machine's products reach, and flops: operations a token, for the
    progress line alone.
    """

    model: nn.Module
    objective: Objective
    batches: Batches
    optimizer: Optimizer
    config: LoopConfig
    identity: dict[str, Any]  # what the result depends on: kept with every state
    here: Ranks = field(default_factory=Ranks)
    evaluate: Callable[[nn.Module], Evaluation] | None = None
    flops: float = 0.0
    rate: float = 0.0

    def __post_init__(self) -> None:
        self.folder = Path(self.config.run)
        self.states = States(self.folder / "state", self.here, keep_last=self.config.keep_last)
        self.step = 0  # steps that are done
        self.tokens = 0  # tokens that they saw
        self.seconds = 0.0  # that they took, of all processes that worked on the run
        self.heldout: dict[str, float] = {}  # the last evaluation's figures
        self.best: tuple[float, int] | None = None  # lowest held-out NLL, and after which step
        self.lr = self.config.optimizer.learning_rate
        self.last: dict[str, Any] = {}  # the last step's figures
        self.last_save: int | None = None
        self._saved_at = self._begun = time.monotonic()

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Error: the loss is not finite, or the run's folder cannot be written.
        """
        size = self._resume()
        metrics = None
        if self.here.rank == 0:
            metrics = Metrics(self.folder, size=size, step=self.step)
        steps = self.config.steps
        with closing(metrics) if metrics else nullcontext(), self._progress() as progress:
            self._begun = self._saved_at = time.monotonic()
            before = self.seconds
            while self.step < steps:
                start = time.monotonic()
                figures, due = self._train_step()
                self.step += 1
                self.seconds = before + time.monotonic() - self._begun
                count = int(figures["tokens"])
                self.tokens += count
                figures |= {"tokens": self.tokens, "tokens_per_second": count / (time.monotonic() - start)}
                self.last = figures | {"seconds": self.seconds}
                if metrics:
                    metrics.write(self.step, self.last)
                progress.advance(count, loss=figures["loss"], **self._share(progress))
                improved = self._evaluate_if_due(metrics)
                if due or improved or self.step == steps:
                    self._save(metrics)

    def _train_step(self) -> tuple[dict[str, Any], bool]:
        """One optimizer step; gives its figures, and whether a state is due after it."""
        parts, tokens = self._parts()
        local = sum(self.objective.weight(part) for part in parts)
        total, count, minutes = self.here.total([local, tokens, self._minutes_due()])
        denominator = max(total, 1e-12)  # a step without a single target moves nothing
        sums: dict[str, Tensor] = {}
        for part in parts:
            loss, more = self.objective.loss(self.model, part)
            (loss / denominator).backward()  # type: ignore[no-untyped-call]
            for name, value in ({"loss": loss} | more).items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        names = sorted(sums)
        values = self.here.total([float(sums[name]) / denominator for name in names])
        figures: dict[str, Any] = dict(zip(names, values, strict=True))
        norm = self._clip()
        if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
            self._stop(figures["loss"], norm)
        height = factor(self.config.schedule, self.step, self.config.steps)
        self.optimizer.step(height)
        every = self.config.save_every
        due = minutes > 0 or bool(every and (self.step + 1) % every == 0)
        return figures | {"lr": self.lr * height, "grad_norm": norm, "tokens": count}, due

    def _parts(self) -> tuple[list[Any], int]:
        """This rank's micro-batches of the step, prepared, and its tokens."""
        batch = self.batches.batch(self.step, self.here.rank, self.here.world)
        size = self.config.micro_windows
        rows = len(batch.tokens)
        with torch.no_grad():
            parts = [
                self.objective.prepare(_rows(batch, start, min(rows, start + size), self.here.device), self.step)
                for start in range(0, rows, size)
            ]
        return parts, batch.tokens.numel()

    def _clip(self) -> float:
        """Scale all gradients so that their global norm is at most the recipe's; gives the norm before."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if (most := self.config.optimizer.clip) > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return float(norm)

    def _minutes_due(self) -> float:
        """1 where this rank is the first and its last state is too old, so that a sum over ranks tells all."""
        minutes = self.config.save_minutes
        return float(self.here.rank == 0 and 0 < minutes * 60 <= time.monotonic() - self._saved_at)

    def _evaluate_if_due(self, metrics: Metrics | None) -> bool:
        """Score held-out text where the recipe says so; True where the model is better than at any time before."""
        every = self.config.evaluate_every
        if not self.evaluate or not (self.step == self.config.steps or (every and self.step % every == 0)):
            return False
        result = self.evaluate(self.model)
        self.heldout = {
            "heldout_nll": result.nll_per_token,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
        }
        if metrics:
            metrics.write(self.step, self.heldout)
        if self.best is not None and result.nll_per_token >= self.best[0]:
            return False
        self.best = (result.nll_per_token, self.step)
        return True

    def _tensors(self) -> dict[str, Any]:
        model = {name: p.detach() for name, p in self.model.named_parameters()}
        return {"model": model, "optimizer": self.optimizer.state_dict(), "objective": self.objective.state_dict()}

    def _save(self, metrics: Metrics | None) -> None:
        # The figures first: a state must never know of a step whose figures are lost.
        size = metrics.sync() if metrics else 0
        record = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "metrics_bytes": size,
            "heldout": self.heldout, "best": self.best, "last": self.last, "identity": self.identity,
        }  # fmt: skip
        self.states.save(self.step, self._tensors(), record, best=self.best[1] if self.best else None)
        self.last_save, self._saved_at = self.step, time.monotonic()

    def _resume(self) -> int:
        """Take up the last state, if there is one; gives the bytes of metrics.jsonl that belong to it."""
        if self.here.rank == 0:
            self.states.clean()
        self.here.wait()
        if not (steps := self.states.steps()):
            return 0
        record = self.states.record(steps[-1])
        tensors = self._tensors()
        self.states.load(steps[-1], tensors)
        self.objective.load_state_dict(tensors["objective"])
        self.step, self.tokens, self.seconds = record["step"], record["tokens"], record["seconds"]
        self.heldout, self.last = record["heldout"], record["last"]
        self.best = None if record["best"] is None else (record["best"][0], record["best"][1])
        self.last_save = self.step
        return int(record["metrics_bytes"])

    def _progress(self) -> Progress:
        each = self.tokens / self.step if self.step else float(self.batches.batch(0).tokens.numel())
        total = each * self.config.steps
        return Progress(total, "tokens", "train", done=self.tokens, quiet=self.here.rank > 0)

    def _share(self, progress: Progress) -> dict[str, str]:
        """The share of the machine's product rate that the run's own operations reach."""
        if not (self.rate and self.flops):
            return {}
        return {"of the machine": f"{100 * progress.rate * self.flops / self.rate / self.here.world:.0f} %"}

    def _stop(self, loss: float, norm: float) -> None:
        batch = self.batches.batch(self.step)
        starts = getattr(batch, "start", None)
        windows = "" if starts is None else f", windows that start at tokens {starts.tolist()}"
        sources = getattr(batch, "source", None)
        if sources is not None and len(set(sources.tolist())) > 1:
            windows += f" of sources {sources.tolist()}"
        last = self.last_save
        good = "there is no state before it" if last is None else f"the last good state is {self.states.path(last)}"
        raise Error(
            f"the loss is {loss} and the gradient's norm {norm} at step {self.step + 1}{windows}; {good}",
            where=self.folder,
            fix="lower the learning rate or look at that text",
        )


def _rows(batch: Any, start: int, stop: int, device: torch.device) -> Any:
    """Rows [start, stop) of every tensor of a batch, on `device`."""
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        cut = {f.name: getattr(batch, f.name)[start:stop].to(device) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **cut)
    return type(batch)(*(x[start:stop].to(device) for x in batch))
