"""Programs of a model: what they may do, and what they try in vain."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemstill.core.errors import Error
from gemstill.evaluation import jail
from gemstill.evaluation.code import CodeMetric, pass_at_k
from gemstill.evaluation.jail import Limits, passes, why_not

jailed = pytest.mark.skipif(bool(why_not()), reason=f"no jail: {why_not()}")
CAUGHT = "try:\n    {}\nexcept {}:\n    pass\nelse:\n    raise SystemExit(1)\n"


def running(word: str) -> bool:
    """Whether a process with this word in its command is alive."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (place / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


@jailed
def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    assert passes("def add(a, b):\n    return a + b\nassert add(2, 3) == 5")
    assert not passes("def add(a, b):\n    return a * b\nassert add(2, 3) == 5")
    assert not passes("def add(a, b")
    assert passes("import collections, itertools, math, re, heapq, typing, statistics, decimal, fractions, datetime")
    assert passes("print('x' * 100)\nopen('notes', 'w').write('kept')\nassert open('notes').read() == 'kept'")
    assert passes("text = 'Größe 🙂'\nassert len(text) == 7")


@jailed
@pytest.mark.parametrize("leave", ["raise SystemExit(0)", "import os\nos._exit(0)", "import sys\nsys.exit()", "exit()"])
def test_a_program_that_leaves_before_its_tests_has_not_passed(leave: str) -> None:
    assert not passes(f"{leave}\nassert False")


@jailed
def test_it_does_not_run_as_the_main_program() -> None:
    assert passes("if __name__ == '__main__':\n    raise ValueError")  # as in the hub's code_eval


@jailed
def test_an_endless_loop_ends() -> None:
    begin = time.monotonic()
    assert not passes("while True:\n    pass", Limits(seconds=1))
    assert time.monotonic() - begin < 30


@jailed
def test_a_fork_bomb_is_contained() -> None:
    assert not passes("import os\nwhile True:\n    os.fork()", Limits(seconds=2))
    assert passes(CAUGHT.format("import os; [os.fork() for _ in range(100)]", "BlockingIOError"))
    time.sleep(0.2)
    assert not running(jail.DRIVER)


@jailed
def test_children_that_stay_behind_are_ended() -> None:
    word = "gemstill-left-behind"
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{word}']"
    assert passes(f"{child}, start_new_session=True)")
    time.sleep(0.2)
    assert not running(word)


@jailed
def test_ten_gigabytes_of_output_go_nowhere(tmp_path: Path) -> None:
    import psutil

    loud = "import os\nfor _ in range(10_000):\n    os.write(1, bytes(1 << 20))"
    before = psutil.Process().memory_info().rss
    assert passes(loud, Limits(seconds=30))
    assert psutil.Process().memory_info().rss < before + (64 << 20)


@jailed
def test_disk_and_memory_are_limited() -> None:
    full = "handle = open('big', 'wb'); [handle.write(bytes(1 << 20)) for _ in range(100)]; handle.flush()"
    assert passes(CAUGHT.format(full, "OSError"))
    many = "for number in range(100):\n    open(str(number), 'wb').write(bytes(1 << 20))"
    assert passes(CAUGHT.format(many.replace("\n", "\n    "), "OSError"))
    raised = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"
    assert passes(CAUGHT.format(raised, "(ValueError, OSError)"))
    assert not passes("bytearray(1 << 31)")


@jailed
def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        talk = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert passes(CAUGHT.format(talk, "OSError"))
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
        for kind in ("SOCK_DGRAM", "SOCK_RAW"):
            send = f"import socket; socket.socket(socket.AF_INET, socket.{kind}).sendto(b'x', ('127.0.0.1', {port}))"
            assert passes(CAUGHT.format(send, "OSError")), kind


@jailed
def test_no_home_no_signals_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    monkeypatch.setenv("GEMSTILL_SECRET", "mine")
    assert passes(CAUGHT.format(f"open({str(secret)!r})", "PermissionError"))
    assert passes(CAUGHT.format(f"open({str(tmp_path / 'new')!r}, 'w')", "PermissionError"))
    assert passes(CAUGHT.format(f"import os; os.listdir({str(Path.home())!r})", "PermissionError"))
    assert passes(CAUGHT.format(f"import os; os.kill({os.getpid()}, 0)", "PermissionError"))
    assert passes("import os\nassert 'GEMSTILL_SECRET' not in os.environ")
    assert secret.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_without_a_jail_the_flag_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "why_not", lambda: "a jail for programs needs Linux")
    with pytest.raises(Error, match=r"needs Linux.*--unsafe-code"):
        passes("pass")
    assert passes("assert 1 + 1 == 2", unsafe=True)
    assert not passes("assert 1 + 1 == 3", unsafe=True)
    assert not passes("import os\nos._exit(0)", unsafe=True)
    begin = time.monotonic()
    assert not passes("while True:\n    pass", Limits(seconds=1), unsafe=True)
    assert time.monotonic() - begin < 30


@jailed
def test_the_metric_is_that_of_the_hub() -> None:
    scores, results = CodeMetric().compute(
        references=["assert add(2, 3) == 5", "assert f() is None"],
        predictions=[["def add(a, b):\n    return a + b", "def add(a, b):\n    return 0"], ["def f(): pass"] * 2],
        k=[1, 2, 100],
    )
    assert scores == {"pass@1": 0.75, "pass@2": 1.0}
    assert [[record["passed"] for _, record in found] for found in results.values()] == [[True, False], [True, True]]
    assert pass_at_k(10, 0, 3) == 0.0
    assert pass_at_k(10, 8, 3) == 1.0
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)


@jailed
def test_lm_eval_takes_it() -> None:
    pytest.importorskip("lm_eval")
    code = (
        "from gemstill.evaluation.code import CodeMetric, jailed_code\n"
        "with jailed_code():\n"
        "    from lm_eval.tasks.humaneval import utils\n"
        "    from lm_eval.tasks.mbpp import utils as mbpp\n"
        "import evaluate\n"
        "assert evaluate.load.__module__.startswith('evaluate')\n"
        "good, bad = 'def add(a, b):\\n    return a + b', 'def add(a, b):\\n    return 7'\n"
        "assert utils.pass_at_k(['assert add(2, 3) == 5'], [[good, bad]], [1]) == {'pass@1': 0.5}\n"
        "assert mbpp.pass_at_1('assert add(2, 3) == 5', [bad]) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
