"""The command line: one command for each job. Parse, call one function, print.

gemstill COMMAND [recipe.yaml] [--field value ...] [--set path.to.field=value ...] [--dry-run]
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gemstill import __version__
from gemstill.core.errors import Error
from gemstill.core.notices import on_one_line

if TYPE_CHECKING:
    from gemstill.core.config import Field

STOPPED, REFUSED = 130, 2  # exit statuses: stopped by Ctrl-C, an Error


@dataclass(frozen=True)
class Command:
    """A job: a function that takes one configuration, and another that tells what it would cost."""

    help: str
    module: str  # of both functions
    config: str  # "module:Class", the configuration
    run: str = "run"
    plan: str = "plan"
    places: tuple[str, ...] = ()  # fields that may be given without their names
    made: str = ""  # the field that says where the result lies
    resumes: bool = True  # stopped, the same command goes on where it was


COMMANDS = {
    "quickstart": Command(
        "the whole recipe in miniature: tokenizer, data, teacher, store, two students, report",
        "quickstart",
        "quickstart:QuickstartConfig",
    ),
    "ladder": Command(
        "students of several sizes, from scratch and distilled, seed by seed, with the rows a sceptic asks for",
        "ladder.command",
        "ladder.config:LadderConfig",
    ),
    "heal": Command(
        "prune a model and heal it by distillation, beside next-token training and no healing",
        "heal",
        "heal:HealConfig",
    ),
    "tokenizer": Command(
        "train a tokenizer on text", "data.vocabulary", "data.vocabulary:TokenizerConfig", made="out", resumes=False
    ),
    "data contaminated": Command(
        "say which documents of a data set overlap the items of benchmarks, and leave them out",
        "evaluation.contaminated",
        "evaluation.config:ContaminatedConfig",
        places=("shards",),
        resumes=False,
    ),
    "data": Command("turn text into token shards", "data.shards", "data.shards:DataConfig", made="out"),
    "train": Command(
        "train a model, from scratch or distilled from a teacher's store",
        "train.run",
        "train.config:TrainConfig",
        run="train",
    ),
    "teach": Command(
        "write a teacher's distributions over shards into a store",
        "distill.teach",
        "distill.teach:TeachConfig",
        made="output",
    ),
    "store verify": Command(
        "read all of a store, compare checksums, decode every row",
        "distill.command",
        "distill.command:VerifyConfig",
        run="verify",
        plan="plan_verify",
        places=("store", "data"),
        resumes=False,
    ),
    "store merge": Command(
        "make one store of parts that were written in several places",
        "distill.command",
        "distill.command:MergeConfig",
        run="merge",
        plan="plan_merge",
        places=("parts", "target"),
    ),
    "prune": Command(
        "make a smaller model of one: the blocks and MLP channels that matter least on text are left out",
        "distill.prune",
        "distill.prune:PruneConfig",
        places=("source", "target"),
        made="target",
        resumes=False,
    ),
    "shrink": Command(
        "make a four-bit GGUF file that says nearly what the model says: rounded with care, then trained so",
        "shrink",
        "shrink:ShrinkConfig",
        places=("source", "target"),
    ),
    "generate": Command(
        "write on from a prompt, or from many",
        "infer.command",
        "infer.config:GenerateConfig",
        places=("source", "prompt"),
        resumes=False,
    ),
    "chat": Command(
        "a conversation at the terminal",
        "infer.chat",
        "infer.config:ChatConfig",
        places=("source",),
        resumes=False,
    ),
    "eval": Command(
        "measure a model on benchmarks: a suite of the Gemma 2 report, or any of lm-eval's tasks",
        "report.evaluation",
        "evaluation.command:EvalConfig",
        places=("source",),
    ),
    "eval compare": Command(
        "compare two evaluations of the same items, item by item",
        "evaluation.compare",
        "evaluation.compare:CompareConfig",
        places=("first", "second"),
        resumes=False,
    ),
    "eval memorization": Command(
        "how much of its training data a model writes down again, and what of it is personal",
        "evaluation.memorization",
        "evaluation.config:MemorizationConfig",
        places=("source",),
    ),
    "eval perplexity": Command(
        "perplexity and bits per byte of held-out text: a folder, a file, JSONL or a data set",
        "evaluation.perplexity",
        "evaluation.config:PerplexityConfig",
        places=("source", "texts"),
        resumes=False,
    ),
    "eval policies": Command(
        "a chat model's answers to probes of six content policies, judged by a model behind a server",
        "evaluation.policies",
        "evaluation.policies:PoliciesConfig",
        places=("source",),
    ),
    "export": Command(
        "write a model in a format that others open: a Hugging Face folder, or a GGUF file for llama.cpp",
        "checkpoint.export",
        "checkpoint.export:ExportConfig",
        places=("source", "target"),
        resumes=False,
    ),
    "inspect": Command(
        "say what is in a model, a store, a data set or a run",
        "report.inspect",
        "report.inspect:InspectConfig",
        places=("source",),
        resumes=False,
    ),
    "report": Command(
        "make a run's report, one HTML file",
        "report.run",
        "report.run:ReportConfig",
        places=("run",),
        resumes=False,
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Error(message, where=self.prog, fix=f"see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 2 refused, 130 stopped)."""
    # OpenMP's threads spin while they wait for each other: beside any other program on the same cores that
    # makes training many times slower than its share. Read when torch is loaded, which is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    command = COMMANDS.get(name)
    on_one_line()
    try:
        if command is None:
            return _overview(words)
        _run(name, command, words[len(name.split()) :])
    except Error as error:
        from gemstill.core.terminal import printable

        print(f"gemstill: {printable(' '.join(str(error).splitlines()))}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        on = "; the same command goes on where it was" if command and command.resumes else ""
        print(f"\ngemstill: stopped{on}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # the reader of our output has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _overview(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        print(f"gemstill {__version__}")
    elif not words or words[0] in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print("usage: gemstill COMMAND [recipe.yaml] [--field value ...] [--set path.to.field=value ...] [--dry-run]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:{width}}  {command.help}")
        print("\ngemstill COMMAND --help shows a command's fields; --dry-run what it would cost.")
    else:
        from gemstill.core.config import nearest

        raise Error(f"there is no command '{words[0]}'", fix=nearest(words[0], COMMANDS))
    return 0


def _run(name: str, command: Command, words: list[str]) -> None:
    from gemstill.core.config import parse

    config_module, _, class_name = command.config.partition(":")
    config_class = getattr(importlib.import_module(f"gemstill.{config_module}"), class_name)
    recipe, overrides, dry_run = _parse(name, command, config_class, words)
    config = parse(config_class, recipe, overrides)
    module = importlib.import_module(f"gemstill.{command.module}")
    result = getattr(module, command.plan if dry_run else command.run)(config)
    if isinstance(result, Mapping):
        print(figures(result))
    elif command.made:
        print(f"written: {getattr(config, command.made)}")


def _parse(
    name: str, command: Command, config_class: type[Any], words: list[str]
) -> tuple[str | None, list[str | tuple[str, Any]], bool]:
    """The recipe's path, the settings in the order given, and whether it is a dry run."""
    from gemstill.core.config import fields, nearest

    known: dict[str, Field] = {_flag(field.name): field for field in fields(config_class)}
    first = {name: field for name, field in known.items() if field.name in command.places}
    known = first | known
    parser = _Parser(
        prog=f"gemstill {name}",
        description=f"{command.help[0].upper()}{command.help[1:]}.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        usage=f"gemstill {name} [recipe.yaml] {' '.join(f'[{place.upper()}]' for place in command.places)}".rstrip()
        + " [--field value ...] [--set path.to.field=value ...] [--dry-run]",
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="set any field, in YAML")
    parser.add_argument("--dry-run", action="store_true", help="print what it would take, and do nothing")
    group = parser.add_argument_group("fields, of the recipe or as flags")
    for flag, field in known.items():
        default = " (required)" if field.default is None else f" [{field.default}]"
        text = f"{field.help}{default}".strip().replace("%", "%%")
        action, kind = ("append", "text") if _many(field) else ("store", field.type)
        group.add_argument(flag, metavar=kind, default=argparse.SUPPRESS, help=text, action=action)
    words = list(words)
    for at, word in enumerate(words):
        flag = word.partition("=")[0]
        if flag in ("--image", "--images", "--mmproj"):
            raise Error("takes no images: the models are text models", where=f"gemstill {name}", fix="give text alone")
        if flag.startswith("--") and flag not in (*known, "--set", "--dry-run", "--help", "--"):
            raise Error(f"there is no flag {flag}", where=f"gemstill {name}", fix=nearest(flag, [*known, "--dry-run"]))
        if word in known and known[word].type == "bool" and words[at + 1 : at + 2] not in (["true"], ["false"]):
            words[at] = f"{word}=true"
    given = vars(parser.parse_intermixed_args(words))
    positional, recipe = list(given.pop("words")), None
    if positional and positional[0].endswith((".yaml", ".yml")):
        recipe = positional.pop(0)
    if command.places and _many(known[_flag(command.places[0])]):  # takes all but those of the other places
        count = max(0, len(positional) - len(command.places) + 1)
        positional[:count] = [positional[:count]]
    if len(positional) > len(command.places):
        extra = positional[len(command.places)]
        raise Error(f"does not know what to do with '{extra}'", where=f"gemstill {name}", fix="recipes end in .yaml")
    settings, dry_run = given.pop("set"), given.pop("dry_run")
    overrides: list[str | tuple[str, Any]] = [*settings]
    overrides += [(place, value) for place, value in zip(command.places, positional, strict=False)]
    for flag, field in known.items():
        if (key := flag.removeprefix("--").replace("-", "_")) in given:
            # Texts and paths are taken letter by letter; anything else is YAML, as in a recipe.
            literal = field.type in ("text", "path") or _many(field)
            overrides.append((field.name, given[key]) if literal else f"{field.name}={given[key]}")
    return recipe, overrides, dry_run


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _many(field: Field) -> bool:
    """Whether a field is a row of texts whose flag is given once for each, letter by letter; lists are YAML."""
    return field.type.startswith("tuple[text")


def figures(values: Mapping[str, Any], indent: str = "") -> str:
    """A result or a plan as aligned lines: 'tokens  1,234,567', 'flops  6.00e+13', 'memory  1.2 GiB'."""
    shown = {key.replace("_", " "): value for key, value in values.items()}
    width = max((len(key) for key, value in shown.items() if not isinstance(value, Mapping)), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", figures(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:{width}}  {_figure(key, value)}")
    return "\n".join(lines)


def _figure(key: str, value: Any) -> str:
    from gemstill.core.progress import duration

    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    words = key.split()
    if "bytes" in words and "per" not in words:
        size, unit = float(value), 0
        while size >= 1000 and unit < 4:
            size, unit = size / 1024, unit + 1
        return f"{size:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}" if unit else f"{value} bytes"
    if "seconds" in words:
        return duration(value)
    if "flops" in words:
        return f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
