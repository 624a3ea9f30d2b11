"""`gemstill eval`: a model on benchmarks, from one command, resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemstill.checkpoint.look import expect_model
from gemstill.core.errors import Error
from gemstill.infer.config import check_quantize


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `gemstill eval`.

    Raises:
        Error: neither a suite nor tasks, or both; a number out of its range.
    """

    source: str  # the model: a folder, a GGUF file or a name on the hub
    suite: str = ""  # a table of benchmarks: gemma2-pretrained, gemma2-instruct, gemma2-open-llm, gemma2-safety, ...
    tasks: str = ""  # or tasks of lm-eval by their names, with commas between
    shots: int | None = None  # few-shot examples of these tasks (by default each task's own)
    limit: int = 0  # items of each task, drawn by the seed; a group such as MMLU is one task; 0: all
    data_root: Path | None = None  # a folder with the items, laid out as docs/evaluation.md says; else the hub
    out: Path = Path("evaluation")  # answers as they come, results.json, the items
    turns: bool = False  # ask with the model's chat template
    quantize: str = ""  # int8, int4, or the file's own blocks (file)
    seed: int = 0  # of the items that a limit takes
    toxicity: str = ""  # a classifier of transformers that rates what the model wrote, where a task wants it
    unsafe_code: bool = False  # run the programs that a model writes even where there is no jail for them

    def __post_init__(self) -> None:
        if bool(self.suite) == bool(self.names):
            fix = "give --suite gemma2-pretrained, or --tasks with names of lm-eval's tasks"
            raise Error("needs a suite or tasks, and not both", where="eval", fix=fix)
        if self.limit < 0 or (self.shots is not None and self.shots < 0):
            raise Error("limit and shots must not be below 0", where="eval")
        if self.suite and self.shots is not None:
            raise Error("a suite has its own shots", where="eval", fix="leave --shots out")
        check_quantize(self.quantize)

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


def run(config: EvalConfig) -> None:
    """Measure, and print the table.

    Raises:
        Error: as `gemstill.evaluate` does.
    """
    expect_model(config.source, any_architecture=True)
    table = _suite(config)
    from gemstill.checkpoint.foreign import open_any
    from gemstill.checkpoint.source import name_of
    from gemstill.evaluation.folder import RESULTS
    from gemstill.evaluation.run import evaluate
    from gemstill.evaluation.table import text

    model, tokenizer = open_any(config.source, quantize=config.quantize or None)
    results = evaluate(
        model,
        tokenizer,
        config.suite or config.names,
        shots=config.shots,
        limit=config.limit,
        data_root=config.data_root,
        out=config.out,
        turns=config.turns,
        seed=config.seed,
        unsafe_code=config.unsafe_code,
        toxicity=config.toxicity,
        name=name_of(config.source),
    )
    print(text(results["gemstill"]["rows"], table))
    for task, notes in results["gemstill"]["notes"].items():
        print(f"{task}: {'; '.join(notes)}")
    print(f"written: {config.out / RESULTS}")


def plan(config: EvalConfig) -> dict[str, Any]:
    """What `run` would do: tasks, items, requests, and what is left out. The tasks' data are read, the model is not."""
    expect_model(config.source, any_architecture=True)
    table = _suite(config)
    from gemstill.evaluation.run import Setting, asked_of
    from gemstill.evaluation.tasks import quiet

    asked = asked_of(config.suite or config.names, config.shots)
    setting = Setting(config.limit, config.data_root, config.turns, config.seed, config.unsafe_code, config.toxicity)
    chosen = setting.select(asked)
    counts: dict[str, int] = {"loglikelihood": 0, "loglikelihood_rolling": 0, "generate_until": 0}
    characters = 0
    for name, task in chosen.tasks.items():
        with quiet():
            task.build_all_requests(limit=None, samples=chosen.samples.get(name))
        for request in task.instances:
            counts[request.request_type] += 1
            characters += sum(len(part) for part in request.args if isinstance(part, str))
    return {
        "suite": table.about if table else "none",
        "items": ", ".join(f"{name} {chosen.items(name)}" for name, leaves in chosen.leaves.items() if leaves),
        "requests": sum(counts.values()),
        "continuations": counts["loglikelihood"],
        "documents": counts["loglikelihood_rolling"],
        "texts_to_write": counts["generate_until"],
        "characters_to_read_at_most": characters,
        "left_out": "; ".join(chosen.absent()) or "nothing",
    }


def _suite(config: EvalConfig) -> Any:
    from gemstill.evaluation.suites import suite

    return suite(config.suite) if config.suite else None
