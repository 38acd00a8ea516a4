"""Signs of life that need no labels, and what is wrong where they fail.

Shapes: B pictures, so 2B views (row i and row i + B are one picture), D dimensions, N vectors.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_PAIRED = 2048
"""Uniformity compares at most so many pictures with each other: 2 million pairs, however large the batch is."""

WINDOW_STEPS = 20
"""Losses of single batches scatter; means of this many are compared."""
PATIENCE_STEPS = 100
"""A run that learns has long shown it by then: healthy losses fall 10 to 20 % in 100 steps, warm-up included."""
LEAST_FALL = 0.01
"""Of the loss, below the first window and below chance. At a learning rate of 1e-5 it moves by less, at a usual one by ten
times as much; pictures that are all alike let it fall towards chance, but no further."""
LEAST_RISE, HALF = 2, 0.5
"""Of contrastive top-1, or half of the twins found. At a very high or low temperature it tells more than the loss."""
COLLAPSED_RANK = 0.05
"""Share of the dimensions that vectors can fill. Healthy projections fill 40 to 60 %, at fifty times the right rate 10 %."""
COLLAPSED_STD = 0.1
"""Below it the mean cosine of two pictures is about 0.99. Healthy features stay above 0.3, healthy projections near 1."""
DIVERGED = 1.1
"""Loss over the lowest window so far, once it is back at chance too."""
TOO_EASY_TOP1, TOO_EASY_EPOCHS, TOO_EASY_CHANCE = 0.95, 10, 0.02
"""So many twins found in so few epochs, among so many others (26 pictures and more): later, few pictures are just learned."""
STARVED_SHARE, STARVED_STEPS = 0.5, 50
"""The model waits for pictures more than it works, and not just while caches are cold."""


def chance_loss(batch_size: int) -> float:
    """NT-Xent of projections that are all alike: ln(2B - 1). A loss that stays here has learned nothing, or collapsed."""
    return math.log(2 * batch_size - 1)


def effective_rank(z_ND: Tensor) -> float:
    """How many dimensions the vectors fill, 1 to min(N, D): exp of the entropy of the normalised singular values.

    Roy & Vetterli 2007; as a sign of collapse RankMe, Garrido et al. 2023.
    """
    z = z_ND.detach().double()
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T  # its eigenvalues are the squares of the singular values
    sigma = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0).sqrt()
    share = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    rank: float = torch.special.entr(share).sum().exp().item()
    return rank


def dimension_std(z_ND: Tensor) -> float:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(D): 1 when spread evenly, 0 when collapsed.

    Chen & He 2021 (SimSiam), section 4.1.
    """
    z = F.normalize(z_ND.detach().float(), dim=1)
    std: float = z.std(0, correction=0).mean().item()
    return std * math.sqrt(z.shape[1])


def alignment(z_2BD: Tensor) -> float:
    """Mean squared distance of a picture's two views on the unit sphere, 0 to 4; falls (Wang & Isola 2020, alpha = 2)."""
    one, other = F.normalize(z_2BD.detach().float(), dim=1).chunk(2)
    return (one - other).square().sum(1).mean().item()


def uniformity(z_2BD: Tensor) -> float:
    """Log of the mean of exp(-2 d^2) over pairs of pictures, -8 to 0; 0 when all are alike (Wang & Isola 2020, t = 2).

    Taken over first views, 2,048 pictures at most.
    """
    z = F.normalize(z_2BD.detach().float(), dim=1)[: len(z_2BD) // 2][:MOST_PAIRED]
    return torch.pdist(z).square().mul(-2).exp().mean().log().item()


def signs_of_life(projections_2BD: Tensor, features_2BD: Tensor | None = None) -> dict[str, float]:
    """The four above of the projections, and the features' spread.

    The head ends in a batch norm, which gives even collapsed projections a spread: `feature_std` sees what it hides.
    """
    projections = F.normalize(projections_2BD.detach().float(), dim=1)  # as the loss sees them
    signs = {
        "effective_rank": effective_rank(projections),
        "dimension_std": dimension_std(projections),
        "alignment": alignment(projections),
        "uniformity": uniformity(projections),
    }
    return signs if features_2BD is None else signs | {"feature_std": dimension_std(features_2BD)}


class Watch:
    """Names trouble, each kind once, in a sentence with the likely cause and what to do.

    It sees the metrics of every step and nothing else, so a resumed run feeds it the lines of metrics.jsonl first and is
    where it was. `batch_size` is of the pictures whose projections `signs_of_life` sees; `workers` is how many processes
    decode pictures, 0 when they are in memory.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        warmup_steps: int,
        learning_rate: float,
        temperature: float,
        projection_dim: int = 128,
        workers: int = 0,
    ) -> None:
        self._warmup_steps, self._workers = warmup_steps, workers
        self._rate = f"--learning-rate (peak now {learning_rate:.3g})"
        self._temperature = f"--temperature (now {temperature:g})"
        self._dims = min(2 * batch_size, projection_dim)
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._top1s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._waits: deque[tuple[float, float]] = deque(maxlen=STARVED_STEPS)
        self._start_loss = self._start_top1 = self._lowest = math.inf
        self._collapsed_before = False
        self._checks = [self._collapse, self._divergence, self._no_progress, self._too_easy, self._starvation]

    def look(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take in the metrics after `step` steps (1, 2, ...); returns what is wrong and was not named before."""
        self._losses.append(metrics["loss"])
        self._top1s.append(metrics["contrastive_top1"])
        self._waits.append((metrics["data_share"], metrics["samples_per_s"]))
        if step == WINDOW_STEPS:
            self._start_loss, self._start_top1 = self._loss, self._top1
        found = []
        for check in tuple(self._checks):
            if trouble := check(step, metrics):
                self._checks.remove(check)
                found.append(f"step {step}: {trouble}")
        if len(self._losses) == WINDOW_STEPS:
            self._lowest = min(self._lowest, self._loss)
        return found

    @property
    def _loss(self) -> float:
        return statistics.fmean(self._losses)

    @property
    def _top1(self) -> float:
        return statistics.fmean(self._top1s)

    def _collapse(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if step <= self._warmup_steps or "effective_rank" not in metrics:
            return None
        rank, spread = metrics["effective_rank"], min(metrics["dimension_std"], metrics.get("feature_std", 1.0))
        collapsed = rank < max(1.5, COLLAPSED_RANK * self._dims) or spread < COLLAPSED_STD
        again, self._collapsed_before = collapsed and self._collapsed_before, collapsed  # one odd batch is no collapse
        if not again:
            return None
        return (
            f"pictures get nearly the same vector (effective rank {rank:.1f} of {self._dims}, spread {spread:.2f} of 1): "
            f"collapse; see that the pictures differ, and start a new --run with a lower {self._rate} or a higher "
            f"{self._temperature}"
        )

    def _divergence(self, step: int, metrics: Mapping[str, float]) -> str | None:
        back_at_chance = self._loss > (1 - LEAST_FALL) * metrics["chance_loss"]
        if step <= self._warmup_steps or not back_at_chance or self._loss < DIVERGED * self._lowest:
            return None
        return (
            f"the loss rose from {self._lowest:.2f} to {self._loss:.2f}, and guessing gives {metrics['chance_loss']:.2f}: "
            f"it diverges; start a new --run with a lower {self._rate}"
        )

    def _no_progress(self, step: int, metrics: Mapping[str, float]) -> str | None:
        if step != max(PATIENCE_STEPS, self._warmup_steps + WINDOW_STEPS):  # judged once: later a loss may well rest
            return None
        fallen = self._loss < (1 - LEAST_FALL) * min(self._start_loss, metrics["chance_loss"])
        if fallen or self._top1 > min(HALF, LEAST_RISE * self._start_top1):
            return None
        if self._loss > (1 - LEAST_FALL) * metrics["chance_loss"]:
            cause = f"the {self._rate} is far too high, or the pictures are all alike"
        else:  # the untrained network finds that many already
            cause = f"the {self._rate} is far too low, or the {self._temperature} too high"
        return (
            f"nothing learned yet: the loss went from {self._start_loss:.2f} to {self._loss:.2f}, where guessing gives "
            f"{metrics['chance_loss']:.2f}, and {self._top1:.1%} of the twins are found; {cause}"
        )

    def _too_easy(self, _step: int, metrics: Mapping[str, float]) -> str | None:
        early = metrics["epoch"] <= TOO_EASY_EPOCHS and metrics["chance_top1"] <= TOO_EASY_CHANCE
        if not early or len(self._top1s) < WINDOW_STEPS or self._top1 < TOO_EASY_TOP1:
            return None
        return (
            f"{self._top1:.0%} of the twins are found after {metrics['epoch']:.1f} epochs: too easy, something trivial tells "
            "the pictures apart, such as a border, a watermark or a colour cast, or the views are too mild; crop such marks "
            "away, lower --crop-area or raise --strength"
        )

    def _starvation(self, _step: int, _metrics: Mapping[str, float]) -> str | None:
        share, rate = (statistics.median(values) for values in zip(*self._waits, strict=True))
        if not self._workers or len(self._waits) < STARVED_STEPS or share <= STARVED_SHARE:
            return None
        waits = f"{share:.0%} of the time goes into pictures, not learning"
        could = f"the model could take {rate / max(1 - share, 0.01):.0f}/s"
        return (
            f"{waits}: {self._workers} workers decode {rate:.0f} pictures/s, {could}; more --workers, smaller pictures "
            "(resize the set once) or a faster disk"
        )
