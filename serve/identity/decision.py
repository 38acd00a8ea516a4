"""What `serve.identity.identify` answers, for those too who ask from afar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve.search import Hit


@dataclass(frozen=True)
class Decision:
    """What `identify` answers."""

    verdict: Literal["known", "unknown", "undecided"]
    """undecided: no threshold was given."""
    identity: str | None
    """Who it is if known."""
    score: float | None
    """Cosine of the probe with the best picture of the best identity; None if the filter leaves nobody."""
    probability: float | None
    """That the best identity is the right one, for probes mixed as those of the calibration; None without one."""
    threshold: float | None
    candidates: tuple[Hit, ...]
    """The best picture of each of the best identities, the best first."""


def summary(decision: Decision) -> str:
    """A decision as text: the verdict, then the candidates."""
    heads = {"known": f"{decision.identity}", "unknown": "UNKNOWN", "undecided": "no threshold, so nothing is decided"}
    likely = "" if decision.probability is None else f"  probability of the best {decision.probability:.3f}"
    limit = "" if decision.threshold is None else f"  threshold {decision.threshold:.4f}"
    ranked = enumerate(decision.candidates, start=1)
    lines = [f"{rank:3}  {hit.score:.4f}  {hit.identity}  #{hit.id}  {hit.source}" for rank, hit in ranked]
    return "\n".join([f"{heads[decision.verdict]}{likely}{limit}", *lines])
