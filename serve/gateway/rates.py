"""A token bucket for each caller: so many requests at once, and then so many per second."""

from __future__ import annotations

import time
from collections.abc import Callable

_REMEMBERED = 10_000
"""Callers; then those whose bucket is full again are forgotten."""


class Rates:
    """For one event loop."""

    def __init__(self, per_s: float, burst: int, now_s: Callable[[], float] = time.monotonic) -> None:
        """Args: per_s, tokens that come back; burst, the most that there are. `per_s` 0: no limit."""
        self._per_s, self._burst, self._now_s = per_s, burst, now_s
        self._full_at_s: dict[str, float] = {}
        """When the bucket of a caller will be full again: that is all there is to know of it."""

    def wait_s(self, caller: str) -> float:
        """Take a token: 0 if there was one, else the seconds until there is; nothing is taken then."""
        if self._per_s == 0:
            return 0.0
        now = self._now_s()
        full_at = max(now, self._full_at_s.get(caller, now)) + 1 / self._per_s
        early = full_at - now - self._burst / self._per_s
        if early > 1e-9:
            return early
        if len(self._full_at_s) >= _REMEMBERED:
            self._full_at_s = {name: at for name, at in self._full_at_s.items() if at > now}
        self._full_at_s[caller] = full_at
        return 0.0
