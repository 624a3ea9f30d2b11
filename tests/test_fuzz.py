"""Hostile checkpoints end as a model or as an Error; and the harness that says so notices when they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from fuzz import cases, guided, seeds, torch_file
from fuzz.__main__ import led_sweep, sweep
from fuzz.runner import Runner
from fuzz.seeds import Seed
from fuzz.worker import MEMORY, Watch, faults, run

FEW, MANY, LED = 100, 2000, 500


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    (tmp_path / "out").mkdir()
    watch = Watch([str(tmp_path / "out")])
    yield watch
    watch.on = False  # a hook can never be taken away


@pytest.fixture(scope="session")
def good() -> list[Seed]:
    return seeds.make()


def test_a_few_cases_keep_the_promises(tmp_path: Path) -> None:
    assert sweep(0, range(FEW), keep=tmp_path) == []


@pytest.mark.slow
def test_many_cases_keep_the_promises(tmp_path: Path) -> None:
    assert sweep(1, range(MANY), keep=tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not guided.there(), reason="coverage leads where atheris is: .venv/bin/pip install atheris")
def test_cases_led_by_coverage_keep_the_promises(tmp_path: Path) -> None:
    assert led_sweep(1, LED, keep=tmp_path) == []


def test_a_case_is_a_function_of_seed_and_number(good: list[Seed]) -> None:
    again = seeds.make()
    assert [seed.files for seed in good] == [seed.files for seed in again]
    for number in range(50):
        assert cases.case(good, 5, number) == cases.case(again, 5, number)
    assert cases.case(good, 5, 0) != cases.case(good, 6, 0)


def test_every_mutation_changes_a_good_file(good: list[Seed]) -> None:
    files = {cases.kind(name): (name, data) for seed in good for name, data in seed.files.items()}
    assert set(cases.KINDS) <= set(files)
    for name, data in files.values():
        for mutator in dict.fromkeys(cases.KINDS.get(cases.kind(name), ())):
            changed = 0
            for number in range(8):
                if changed:
                    break
                try:
                    changed += mutator(Random(number), data) != data
                except cases.UNCHANGEABLE:
                    continue
            assert changed > 0, f"{mutator.__name__} leaves {name} as it is"


def test_a_checkpoint_survives_packing(good: list[Seed]) -> None:
    for seed in good:
        assert guided.unpack(guided.pack(seed)) == seed


def test_a_damaged_archive_is_no_archive() -> None:
    """Whatever byte of it is damaged, it is whole or none: a second mutation meets what the first one left."""
    data = torch_file.pack({"data.pkl": b"x, y and z; " * 40 + bytes(range(256))}, compress=True)
    refused = 0
    for place in range(len(data)):
        try:
            torch_file.unpack(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        except ValueError:
            refused += 1
    assert refused > len(data) // 2


DEEDS = [
    ("raise KeyError('x')", "KeyError"),
    ("raise BaseException('x')", "BaseException"),
    ("bytearray(400 << 20)[::4096]", "MiB, a good load"),
    ("open('outside', 'w')", "did outside: open"),
    ("__import__('os').mkdir('outside')", "did outside: os.mkdir"),
    ("__import__('os').system('true')", "did outside: os.system"),
    ("__import__('subprocess').run(['true'])", "did outside: subprocess.Popen"),
    ("__import__('pickle').loads(b'cbuiltins\\nlen\\n.')", "did outside: pickle.find_class"),
]


@pytest.mark.parametrize(("deed", "what"), DEEDS)
def test_broken_promises_are_noticed(
    deed: str, what: str, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fuzz.worker.examine", lambda source, out: str(eval(compile(deed, "deed", "exec"))))
    found = faults(run({"source": "nowhere"}, watch), {"grown": 0, "child": 2**40})
    assert len(found) == 1
    assert what in found[0]


def test_an_error_is_a_refusal(watch: Watch) -> None:
    answer = run({"source": "/nowhere/at/all"}, watch)
    assert answer["ended"] == "refused"
    assert faults(answer, {"grown": 0, "child": 2**40}) == []


DEADLY = [
    ("__import__('os').abort()", "SIGABRT"),
    ("__import__('os').kill(__import__('os').getpid(), 11)", "SIGSEGV"),
    ("__import__('time').sleep(60)", "more than 2 seconds"),
    ("open(str(source) + '/config.json', 'a').write(' ')", "changed the checkpoint"),
]


@pytest.mark.slow
def test_the_death_of_a_worker_is_noticed_and_another_goes_on(
    tmp_path: Path, good: list[Seed], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python runs a file of this name at its start; a case's deed is the text of a file that lies in it.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "if 'fuzz.worker' in sys.orig_argv:\n"
        "    import gemstill\n"
        "    load = gemstill.load\n"
        "    def patched(source, **options):\n"
        "        deed = Path(source) / 'deed.txt'\n"
        "        exec(deed.read_text() if deed.exists() else '')\n"
        "        return load(source, **options)\n"
        "    gemstill.load = patched\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runner = Runner((tmp_path / "root").resolve(), good[:1])
    try:
        for deed, what in DEADLY:
            monkeypatch.setattr("fuzz.runner.PATIENCE", 2.0 if "sleep" in deed else 60.0)
            verdict = runner.run(replace(good[0], files=good[0].files | {"deed.txt": deed.encode()}), save=False)
            assert verdict.failed
            assert what in verdict.what
        monkeypatch.setattr("fuzz.runner.PATIENCE", 60.0)
        assert runner.run(good[0], save=True).ended == "loaded"
    finally:
        runner.close()


def test_limits_are_those_of_a_good_load_and_so_much_more() -> None:
    answer = {"ended": "loaded", "what": "", "seconds": 9.9, "grown": 5 + MEMORY, "child": 7 + MEMORY, "outside": []}
    limits = {"grown": 5, "child": 7}
    assert faults(answer, limits) == []
    for name, value in (("ended", "failed"), ("seconds", 10.1), ("grown", 6 + MEMORY), ("child", 8 + MEMORY)):
        assert len(faults(answer | {name: value}, limits)) == 1
    assert faults(answer | {"outside": ["open /x"]}, limits) == ["did outside: open /x"]


def test_the_watch_knows_places(tmp_path: Path, watch: Watch) -> None:
    watch.on = True
    (tmp_path / "out" / "a").write_text("1")
    json.loads((tmp_path / "out" / "a").read_text())
    inside = list(watch.seen)
    (tmp_path / "b").write_text("b")
    watch.on = False
    assert inside == []
    assert watch.seen == [f"open {tmp_path.resolve() / 'b'}"]
