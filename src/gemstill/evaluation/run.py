"""`gemstill.evaluate`: a model on lm-eval's tasks, resumable, with its scores, items and data in one folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemstill.core.files import locked, write, writing
from gemstill.core.notices import note
from gemstill.evaluation.answers import Answering, Answers
from gemstill.evaluation.folder import ANSWERS, RESULTS, SAMPLES
from gemstill.evaluation.suites import SUITES, Suite
from gemstill.evaluation.table import rows
from gemstill.evaluation.tasks import SEED, Asked, Selected, cut, quiet, require, select
from gemstill.evaluation.toxicity import rater

if TYPE_CHECKING:
    from torch import Tensor

    from gemstill.model.adapter import Adapter
    from gemstill.model.transformer import Transformer
    from gemstill.text.tokenizer import Tokenizer

_SAMPLED = 1 << 16  # values of each weight that tell one model from another
_BOOTSTRAP = 1000  # draws, for the standard errors of metrics that are no means


@dataclass(frozen=True)
class Setting:
    """How tasks are run. limit: items of a task (a group is one task); 0: all. turns: prompts as the model's turns.

    seed: which items a limit takes. unsafe_code: run a model's programs even where there is no jail. toxicity: the
    classifier that rates what a model wrote.
    """

    limit: int = 0
    data_root: Path | None = None
    turns: bool = False
    seed: int = 0
    unsafe_code: bool = False
    toxicity: str = ""

    def select(self, asked: Sequence[Asked]) -> Selected:
        """The tasks, loaded and cut to the limit. Raises Error as `tasks.select` does."""
        rated = rater(self.toxicity) if self.toxicity else None
        chosen = select(asked, data_root=self.data_root, unsafe_code=self.unsafe_code, rated=rated)
        cut(chosen, self.limit, self.seed)
        return chosen


def evaluate(
    model: Transformer | Adapter,
    tokenizer: Tokenizer,
    tasks: str | Sequence[str],
    *,
    shots: int | None = None,
    limit: int = 0,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    turns: bool = False,
    seed: int = 0,
    unsafe_code: bool = False,
    toxicity: str = "",
    name: str = "model",
) -> dict[str, Any]:
    """Measure a model on a suite (by its name) or on tasks of lm-eval (their names).

    model: ours, or one of `transformers` in `gemstill.model.adapter.Adapter`, its tokenizer opened from its own files
    (`gemstill.checkpoint.foreign.open_any` gives both). shots: few-shot examples of all tasks, by default each task's
    own. limit: items of each task, drawn by `seed`; a group such as MMLU is one task. data_root: a folder with the
    items instead of the hub. out: a folder for answers as they come, results.json and the items with what the model
    said; the same call goes on where it was stopped. turns: ask with the model's chat template. unsafe_code: run a
    model's programs even where there is no jail. toxicity: a sequence classifier of transformers, for tasks that have
    what a model wrote rated.

    Returns lm-eval's results (with "samples", the items), and under "gemstill" the rows with 95 % intervals, the
    files' SHA-256, what was left out and why.

    Raises:
        Error: lm-eval is not there; an unknown suite or task; data that cannot be had or are wrong; `out` holds
            another model's answers; turns without a chat template.
    """
    require()
    table = SUITES.get(tasks) if isinstance(tasks, str) else None
    asked = asked_of(tasks, shots)
    root = None if data_root is None else Path(data_root).expanduser()
    turned = turns or bool(table and table.turns)
    adapter = _adapted(model, tokenizer)
    if turned:  # a model without turns is refused before anything is read
        adapter.apply_chat_template([{"role": "user", "content": "Hello"}])
    setting = Setting(limit, root, turned, seed, unsafe_code, toxicity)
    place = None if out is None else Path(out)
    return measure(adapter, fingerprint(model, tokenizer, adapter.reading()), asked, setting, place, table, name)


def _adapted(model: Transformer | Adapter, tokenizer: Tokenizer) -> Any:
    """The model as lm-eval calls one."""
    from gemstill.model.adapter import Adapter

    if isinstance(model, Adapter):
        from gemstill.evaluation.foreign import ForeignAdapter

        return ForeignAdapter(model, tokenizer)
    from gemstill.evaluation.adapter import Adapter as OurAdapter

    return OurAdapter(model, tokenizer)


def asked_of(tasks: str | Sequence[str], shots: int | None = None) -> list[Asked]:
    """The tasks of a suite, or those of these names."""
    if isinstance(tasks, str) and tasks in SUITES:
        return SUITES[tasks].asked()
    return [Asked(task, shots) for task in ([tasks] if isinstance(tasks, str) else tasks)]


def measure(
    lm: Any, model: str, asked: Sequence[Asked], setting: Setting, out: Path | None, table: Suite | None, name: str
) -> dict[str, Any]:
    """Run tasks with any model of lm-eval's interface. model: its fingerprint."""
    with locked(out) if out else contextlib.nullcontext():
        with Answers(out / ANSWERS if out else None, model, name) as answers:
            chosen = setting.select(asked)
            for what in chosen.absent():
                note(what)
            results = _asked(lm, answers, chosen, setting)
        results["config"] = {
            "model": name, "model_args": {}, "batch_size": None, "limit": setting.limit or None,
            "bootstrap_iters": _BOOTSTRAP, "random_seed": 0, "numpy_seed": SEED, "torch_seed": SEED,
            "fewshot_seed": SEED,
        }  # fmt: skip
        truncated = getattr(lm, "truncated", 0)
        if truncated:
            note(f"{truncated} requests were longer than the context and lost their beginning", where=name)
        results["gemstill"] = {
            "suite": table.name if table else "",
            "fingerprint": model,
            "asked": chosen.leaves,
            "rows": rows(results, chosen.leaves, table),
            "left_out": chosen.left_out,
            "notes": chosen.notes,
            "files": chosen.files,
            "truncated": truncated,
            "turns": setting.turns,
            "seed": setting.seed,
            "toxicity": setting.toxicity,
        }
        if out:
            _write(results, out)
    return results


def _asked(lm: Any, answers: Answers, chosen: Selected, setting: Setting) -> dict[str, Any]:
    """lm-eval's own loop over the chosen tasks."""
    import lm_eval.evaluator
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    versions = {name: task.VERSION for name, task in chosen.tasks.items()}
    with quiet(), _one_process(), warnings.catch_warnings():
        # Of empty means: lm-eval measures BBQ's kinds of items apart, and not each is there.
        warnings.simplefilter("ignore", RuntimeWarning)
        results: dict[str, Any] = lm_eval.evaluator.evaluate(
            Answering(lm, answers, versions),
            {"tasks": chosen.tasks, "groups": chosen.groups},
            samples=chosen.samples,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=setting.turns,
            fewshot_as_multiturn=setting.turns,
            confirm_run_unsafe_code=True,
        )
    for config in results["configs"].values():
        if "custom_dataset" in config:
            config["custom_dataset"] = "files under the data root"
    return results


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval draws its bootstrap in this process: a pool of processes would take longer to start."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]


def _write(results: dict[str, Any], out: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, default=handle_non_serializable) + "\n"

    with writing(out / SAMPLES, folder=True) as folder:
        for task, samples in results["samples"].items():
            text = "".join(map(as_json, samples))
            (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    write(out / RESULTS, as_json({key: value for key, value in results.items() if key != SAMPLES}, 2))


def fingerprint(model: Transformer | Adapter, tokenizer: Tokenizer, reading: Sequence[Any] = ()) -> str:
    """Tells one model from another by its network, tokenizer, precision and up to 65,536 values of each weight.

    reading: how texts are given to it (`Scored.reading`), where answers are not kept under the ids of their prompts.
    """
    import torch

    from gemstill.model.quantized import named_weights

    digest = hashlib.sha256(f"{model.config}|{model.compute_dtype}|{tokenizer.fingerprint}|{reading}".encode())
    for weight_name, weight in named_weights(model):
        data: Tensor = weight if isinstance(weight, torch.Tensor) else weight.data
        flat = data.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{weight_name}|{tuple(weight.shape)}|{data.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
