"""Whatever happens to those who write a store, its bytes are an undisturbed process's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def crashes(folder, mode, count=0):
    """What crashes.py prints, in a process of its own: it forks, which a process with threads must not."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crashes.py")), str(folder), mode, str(count)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split()[-1])


def test_killed_at_any_operation_it_goes_on_to_the_same_bytes(tmp_path):
    # A write, an fsync, a rename and the folder's fsync for the code, two blocks, the card and the index twice.
    assert crashes(tmp_path, "all") >= 6 * 4


@pytest.mark.slow
def test_killed_twenty_times_at_random_the_bytes_are_the_same(tmp_path):
    assert crashes(tmp_path, "random", 20) >= 20


def test_three_processes_at_once_write_what_one_writes(tmp_path):
    crashes(tmp_path, "together", 3)


def test_a_full_disk_leaves_no_half_block(tmp_path):
    crashes(tmp_path, "full")
