"""What the sides of a benchmark share: a process of their own to run in, a clock, and the memory they take.

Peers' interpreters import this too: nothing beyond the standard library.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

GIB, MIB = 2**30, 2**20


class SideFailed(SystemExit):
    """Ends the benchmark with what the process complained of, unless it goes on without that side."""


def run_side(
    python: str, script: str, side: str, *options: object, part: str | None = None, timeout_s: float | None = None
) -> str:
    """The last line that `script --side SIDE OPTIONS` prints, if any. Raises SideFailed and subprocess.TimeoutExpired.

    `part` says in a failure what of the side it was.
    """
    command = [python, script, "--side", side, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        name = f"{side}, {part}" if part else side
        raise SideFailed(f"{name} failed:\n{done.stderr.strip()[-2000:] or 'no message'}")
    return (done.stdout.splitlines() or [""])[-1]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_bytes(name: str, file: str = "/proc/self/status") -> int:
    """VmRSS, VmHWM (its peak), RssAnon or RssFile of this process, for example, or MemAvailable of /proc/meminfo."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
