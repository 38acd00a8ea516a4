"""One writer of an index at a time, over all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two writers would do the same work twice, and the later folder wins
    fcntl = None  # type: ignore[assignment]

_PAUSE_S = 0.05


@contextmanager
def exclusive(path: Path, proceed: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on a file, which is made. `proceed` is called while waiting, and raises to give up. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                proceed()
                time.sleep(_PAUSE_S)
        yield  # the system lets go of the lock with the file, also of a killed process
