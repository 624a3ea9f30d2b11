"""A jail for programs that a model wrote: no network, no home folder, little time, memory, disk and few processes."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemstill.core.errors import Error

PROGRAM = "program.py"
PATIENCE = 10  # seconds on the clock for each of a processor: what else runs must not decide what passes
SYS_RESOURCE = 24  # the capability, of linux/capability.h
# What a Python and its standard library read; nothing of the user's own.
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/opt", "/dev/null", "/dev/zero", "/dev/urandom")
# Runs the program as the hub's `code_eval` does, in globals without a name. The word tells that it came to its end:
# an exit status alone would also come of a program that leaves before its tests.
DRIVER = f"""
import os, resource, sys
seconds, disk = int(sys.argv.pop()), int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
word, out, own, null = sys.argv.pop().encode(), os.dup(1), os.getpid(), os.open(os.devnull, os.O_RDWR)
for handle in range(3):
    os.dup2(null, handle)
with open("{PROGRAM}", encoding="utf-8") as file:
    text = file.read()
exec(text, {{}})
if os.getpid() == own:
    os.write(out, word)
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use. The time is that of the hub's `code_eval`, which counts it on the clock.

    seconds: of a processor, and ten times as many on the clock. memory: bytes. disk: bytes of a file, and of all files
    when one is opened. processes: at once, threads among them.
    """

    seconds: int = 3
    memory: int = 1 << 30
    disk: int = 16 << 20
    processes: int = 16


def why_not() -> str:
    """Why there is no jail on this machine; "" where there is one: Linux from 6.12 on, and the package sandlock."""
    if not sys.platform.startswith("linux"):
        return "a jail for programs needs Linux"
    try:
        from sandlock import landlock_abi_version, min_landlock_abi
    except (ImportError, OSError) as error:  # OSError: a library built for another machine
        return f"the package sandlock cannot be used ({error}); pip install 'gemstill[eval]'"
    have, need = landlock_abi_version(), min_landlock_abi()
    return "" if have >= need else f"the kernel's Landlock has version {max(have, 0)}, a jail needs {need} (Linux 6.12)"


def passes(program: str, limits: Limits = Limits(), *, unsafe: bool = False) -> bool:
    """Whether a Python program comes to its end without an exception, within the limits.

    It runs in a child in a new folder, which is deleted afterwards. It cannot reach any network, read or write
    files outside its folder (Python's own excepted, which it may read), nor signal processes outside of the jail.
    What it prints is thrown away.

    unsafe: run it as an ordinary child, with the limits on time and memory alone.

    Raises:
        Error: there is no jail here, and `unsafe` is not given.
    """
    if not unsafe and (why := why_not()):
        fix = "run it on such a machine, or accept that the model's programs may do anything: --unsafe-code"
        raise Error(why, where="code", fix=fix)
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="gemstill-jail-", ignore_cleanup_errors=True) as folder:
        # Lone surrogates cannot be written, and no Python would read them.
        Path(folder, PROGRAM).write_text(program, encoding="utf-8", errors="replace")
        command = [sys.executable, "-I", "-B", "-c", DRIVER, word, str(limits.disk), str(limits.seconds)]
        said = _loose(command, folder, limits) if unsafe else _jailed(command, folder, limits)
    return said == word.encode()


def _jailed(command: list[str], folder: str, limits: Limits) -> bytes:
    from sandlock import BranchAction, Sandbox, SandlockError

    prefixes = {str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix)} | {sys.prefix}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sandlock's, of a field that it reads nevertheless
        sandbox = Sandbox(
            fs_readable=[path for path in (*READABLE, *sorted(prefixes), folder) if os.path.exists(path)],
            fs_writable=[folder, os.devnull],
            workdir=folder,
            cwd=folder,
            on_exit=BranchAction.ABORT,
            on_error=BranchAction.ABORT,
            max_disk=limits.disk,
            max_memory=limits.memory,
            max_processes=limits.processes,
            max_open_files=64,
            clean_env=True,
            env={"TMPDIR": folder, "HOME": folder, "OMP_NUM_THREADS": "1"},
            no_coredump=True,
            **_unprivileged(),
        )
        try:
            found: bytes = sandbox.run(command, timeout=limits.seconds * PATIENCE).stdout
        except SandlockError as error:
            fix = "run it elsewhere, or accept that the model's programs may do anything: --unsafe-code"
            raise Error(f"the jail cannot be set up: {error}", where="code", fix=fix) from None
        return found


def _unprivileged() -> dict[str, int]:
    """The user inside: one who cannot raise the limit on the size of a file, though we could."""
    status = Path("/proc/self/status").read_text()
    powers = int(status.partition("CapEff:")[2].split()[0], 16)
    return {"uid": 65534, "gid": 65534} if powers >> SYS_RESOURCE & 1 else {}


def _loose(command: list[str], folder: str, limits: Limits) -> bytes:
    import resource

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    child = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=restrict,
    )
    try:
        return child.communicate(timeout=limits.seconds * PATIENCE)[0]
    except subprocess.TimeoutExpired:
        return b""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with all that it started
        child.wait()
