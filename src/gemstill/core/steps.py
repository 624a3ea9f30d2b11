"""The steps of a long run: which are done, how long they took and what came out."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemstill.core import files
from gemstill.core.errors import Error


class Steps:
    """What of a run is done, kept in steps.json so that nothing is done twice.

    folder: of the run. settings: what all steps depend on (JSON values); a folder that holds a run of other
    settings is refused.

    Raises:
        Error: naming the first setting that differs, as it was and as it is.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.path = folder / "steps.json"
        self.done: dict[str, Any] = files.read_json(self.path) if self.path.exists() else {}
        for name, value in settings.items():
            if (was := self.done.setdefault(name, value)) != value:
                raise Error(
                    f"holds a run over {_difference(name, was, value)}", where=folder, fix="name another folder"
                )

    def do(self, name: str, work: Callable[[], Any]) -> None:
        """Do a step unless it is done; its result, seconds and the peak of memory so far are recorded."""
        if name in self.done:
            return
        start = time.monotonic()
        result = work()
        seconds = result["seconds_of_run"] if isinstance(result, dict) and "seconds_of_run" in result else 0.0
        self.done[name] = {"seconds": max(seconds, time.monotonic() - start), "result": result}
        self.done["peak_rss_bytes"] = max(self.done.get("peak_rss_bytes", 0), _peak_memory())
        files.write_json(self.path, self.done)

    def result(self, name: str) -> Any:
        """What a step that is done came to."""
        return self.done[name]["result"]

    @property
    def each(self) -> dict[str, float]:
        """The seconds of each step that is done, in the order of doing."""
        return {
            name: float(step["seconds"])
            for name, step in self.done.items()
            if isinstance(step, dict) and "seconds" in step and "result" in step
        }

    @property
    def seconds(self) -> float:
        """The time of all steps together."""
        return sum(self.each.values())


def _difference(name: str, was: Any, now: Any) -> str:
    """Where two settings differ: 'text a, not b', 'recipe.seeds 5, not 3'."""
    while isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in [*was, *now] if was.get(key) != now.get(key))
        name, was, now = f"{name}.{key}", was.get(key), now.get(key)
    return f"{name} {was!s:.80}, not {now!s:.80}"


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit
