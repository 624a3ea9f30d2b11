"""`gemstill ladder`: do what is not yet done, in order, and say after each step what is known so far."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gemstill.core import files
from gemstill.core.config import as_dict
from gemstill.core.errors import Error
from gemstill.core.machine import probe
from gemstill.core.progress import duration
from gemstill.core.steps import Steps
from gemstill.data.shards import TYPICAL_BYTES_PER_TOKEN, DataConfig
from gemstill.data.sources import source_files
from gemstill.data.vocabulary import TokenizerConfig
from gemstill.ladder.config import LadderConfig
from gemstill.ladder.jobs import Job, Sizes, jobs
from gemstill.ladder.summary import summarise
from gemstill.quickstart import text_source

SHARE = 0.45  # of the products' rate that training reaches with networks this small


def run(config: LadderConfig) -> dict[str, Any]:
    """Do what is not yet done of the ladder; summary.json, report.html and ladder.svg are renewed after each step.

    Killed at any moment, the same call goes on where it was.

    Raises:
        Error: the text cannot be read or is too little, everything together takes more than the budget, the
            folder holds a run of another recipe or another process works in it, or cannot be written.
    """
    from gemstill.report.ladder import ladder_report

    _within_budget(config, jobs(config, _estimated(config)))
    folder = Path(config.run)
    with files.locked(folder):
        settings = {key: value for key, value in as_dict(config).items() if key != "run"}
        steps = Steps(folder, recipe=settings | {"data": str(text_source(config.data).path)})
        steps.do("tokenizer", lambda: _tokenizer(config))
        steps.do("data", lambda: _data(config))
        counted = steps.result("data")
        sizes = Sizes(counted["student_tokens"], counted["heldout_tokens"])
        todo = jobs(config, sizes)
        _within_budget(config, todo)
        for job in todo:
            if job.name not in steps.done:
                print(progress(steps, todo, job), file=sys.stderr, flush=True)
                steps.do(job.name, partial(job.work, steps))
                files.write_json(folder / "summary.json", summarise(config, sizes, steps))
                ladder_report(folder)
        summary = summarise(config, sizes, steps)
        files.write_json(folder / "summary.json", summary)
        report = ladder_report(folder)
    for sentence in summary["in_words"]:
        print(sentence)
    return {"report": str(report), "flops": summary["flops"], "wall_seconds": summary["wall_seconds"]}


def plan(config: LadderConfig) -> dict[str, Any]:
    """What `run(config)` would take, before anything runs.

    Raises:
        Error: the text cannot be read, or everything together takes more than the budget.
    """
    sizes = _estimated(config)
    todo = jobs(config, sizes)
    _within_budget(config, todo)
    shapes = {student.name: config.shape(student.model) for student in config.students}
    parts: dict[str, float] = {}
    for job in todo:
        part = job.name.partition("/")[0]
        parts[part] = parts.get(part, 0.0) + job.flops
    flops = sum(parts.values())
    return {
        "text": str(text_source(config.data).path),
        "students": ", ".join(f"{name} {shape.body_parameters:,}" for name, shape in shapes.items()),
        "tokens_of_a_student": config.tokens,
        "estimated_tokens_of_the_sample": sizes.student,
        "trainings_and_stores": len(todo),
        **{f"flops of {part}": value for part, value in parts.items()},
        "flops": flops,
        "budget_flops": config.budget,
        "seconds": flops / _rate(),
    }


def progress(steps: Steps, todo: list[Job], job: Job) -> str:
    """One line before a step: the share of all FLOPs that is done, the time that is left, what comes."""
    total = sum(each.flops for each in todo)
    finished = [each for each in todo if each.name in steps.done]
    done = sum(each.flops for each in finished)
    spent = sum(steps.each[each.name] for each in finished)
    rate = done / spent if done and spent else _rate()
    left = duration((total - done) / rate)
    return f"ladder  {done / total:4.0%}  {done:.2e} of {total:.2e} FLOP · {left} left · {job.name}"


def _rate() -> float:
    machine = probe()
    return 1e9 * SHARE * machine.rate(machine.fast_dtype)


def _estimated(config: LadderConfig) -> Sizes:
    """The text's tokens by the sizes of its files."""
    size = sum(path.stat().st_size for path in source_files(text_source(config.data)))
    tokens = size / TYPICAL_BYTES_PER_TOKEN
    heldout = tokens * config.heldout_fraction
    return Sizes(round((tokens - heldout) * config.student_fraction), round(heldout))


def _within_budget(config: LadderConfig, todo: list[Job]) -> None:
    flops = math.fsum(job.flops for job in todo)
    if flops > config.budget:
        raise Error(
            f"everything together takes {flops:.2e} FLOP, more than the budget of {config.budget:.2e}",
            where="ladder",
            fix="lower tokens or teacher.tokens, leave out baselines or ablations, or raise budget",
        )


def _tokenizer(config: LadderConfig) -> dict[str, Any]:
    from gemstill.data import vocabulary

    made = TokenizerConfig(
        text_source(config.data),
        Path(config.run) / "tokenizer",
        config.vocab_size,
        heldout_fraction=config.heldout_fraction,
    )
    return {"fingerprint": vocabulary.run(made).fingerprint}


def _data(config: LadderConfig) -> dict[str, Any]:
    """All of the text, and the students' sample of its documents; the same documents are held out of both."""
    from gemstill.data import shards

    def made(name: str, fraction: float) -> shards.Written:
        folder = Path(config.run)
        return shards.run(
            DataConfig(
                text_source(config.data),
                folder / "tokenizer",
                folder / name,
                heldout_fraction=config.heldout_fraction,
                fraction=fraction,
                drop_near_copies=True,
            )
        )

    whole, sample = made("data", 1.0), made("data-students", config.student_fraction)
    if whole.heldout is None or whole.heldout.num_tokens < config.window:
        raise Error("too little text is held out to measure by", where=config.data, fix="raise heldout_fraction")
    return {
        "train_tokens": whole.train.num_tokens,
        "train_documents": whole.train.num_documents,
        "student_tokens": sample.train.num_tokens,
        "student_documents": sample.train.num_documents,
        "heldout_tokens": whole.heldout.num_tokens,
        "heldout_documents": whole.heldout.num_documents,
        "corpus": files.read_json(whole.train.folder / "index.json")["corpus"],
    }
