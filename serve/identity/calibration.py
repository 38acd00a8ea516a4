"""The file of `simclr reid calibrate`: from which score on a probe is named, and how likely a score is right.

It belongs to the vectors of one encoder, and to a gallery of about the size that it was chosen on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from serve.errors import ContractError, EncoderMismatch
from serve.files import atomic_path

_NOTHING_SHOWN, _PINNED_DOWN = 3, 30
"""The rules of 3 and 30 (Doddington et al. 2000): errors to expect before a rate can be shown, and is known to about 30 %."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Measured(_Strict):
    """A rate over some probes. The interval (95 %) counts identities: probes of one identity fail together."""

    rate: Annotated[float, Field(ge=0, le=1)]
    low: Annotated[float, Field(ge=0, le=1)]
    high: Annotated[float, Field(ge=0, le=1)]
    probes: PositiveInt
    identities: PositiveInt

    def __str__(self) -> str:
        return f"{self.rate:.2%} ({self.low:.2%} to {self.high:.2%}): {self.probes} probes of {self.identities} identities"


class Point(_Strict):
    """One threshold, and both rates there."""

    threshold: float
    fpir: Annotated[float, Field(ge=0, le=1)]
    tpir: Annotated[float, Field(ge=0, le=1)]


class Calibration(_Strict):
    """A threshold for a stated FPIR, what was measured when it was chosen, and the probability of a match by score."""

    format: Literal["simclr-threshold-1"]
    encoder_id: str
    metric: Literal["cosine"]
    asked_fpir: Annotated[float, Field(gt=0, lt=1)]
    threshold: float
    """A probe is named if its best score is this or more."""
    slope: NonNegativeFloat
    intercept: float
    """Probability = 1 / (1 + exp(-(slope * score + intercept)))."""
    identities: PositiveInt
    """Enrolled when it was chosen."""
    where: str
    """The filter among which it was chosen; empty: all."""
    tracks: bool
    """Whether the probes were tracks, pooled, or single pictures."""
    held_out: bool
    """Whether the non-mated probes are of enrolled identities, each left out in its turn."""
    fpir: Measured
    tpir: Measured
    curve: tuple[Point, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a threshold file. Raises: ContractError."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            reason = error.strerror or error
            raise ContractError(f"{path}: cannot be read ({reason}); give a file of `simclr reid calibrate`") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "threshold file"
            raise ContractError(f"{path}: {place}: {first['msg']}; give a file of `simclr reid calibrate`") from error

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2) + "\n")

    def require(self, encoder_id: str) -> None:
        """Refuse the scores of another encoder. Raises: EncoderMismatch."""
        if encoder_id != self.encoder_id:
            raise EncoderMismatch(
                f"the threshold was chosen on vectors of encoder {self.encoder_id}, these are of {encoder_id}; "
                "choose it anew: simclr reid calibrate GALLERY --probes SRC --out FILE"
            )

    def probability(self, score: float) -> float:
        """That the best identity is right if its score is this; it grows with the score."""
        return float(expit(self.slope * score + self.intercept))

    def warning(self) -> str | None:
        """One sentence if the non-mated probes are too few for the FPIR that was asked; else None."""
        some, least = self.fpir.identities, math.ceil(_NOTHING_SHOWN / self.asked_fpir)
        enough = math.ceil(_PINNED_DOWN / self.asked_fpir)
        if some >= enough:
            return None
        basis = f"non-mated probes of {some} identities are too few to"
        if some < least:
            return (
                f"{basis} show an FPIR of {self.asked_fpir:g}: it may be up to {self.fpir.high:.2g}; "
                f"wanted {least} at least, {enough} to know it well"
            )
        return f"{basis} know the FPIR well: it may be {self.fpir.low:.2g} to {self.fpir.high:.2g}; wanted {enough}"

    def summary(self) -> str:
        """What was chosen and measured, and the curve as a table."""
        how = ", each left out of the gallery in its turn: no probe was a stranger's" if self.held_out else ""
        lines = [f"threshold {self.threshold:.4f} among {self.identities} identities"]
        lines += [f"FPIR {self.fpir}, non-mated{how}", f"TPIR {self.tpir}, mated", f"{'FPIR':>8} {'TPIR':>8} {'threshold':>10}"]
        lines += [f"{point.fpir:8.2%} {point.tpir:8.2%} {point.threshold:10.4f}" for point in self.curve]
        return "\n".join(lines)


def fit_logistic(scores_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope (not negative) and intercept of the probability that an answer of this score is right.

    Platt's method with his smoothed targets (1999), so that scores that tell right from wrong without a fault still give
    probabilities short of 0 and 1. It has two parameters and never falls: it holds on few probes, where isotonic steps do not.
    """
    right, wrong = int(right_N.sum()), int((~right_N).sum())
    target = np.where(right_N, (right + 1) / (right + 2), 1 / (wrong + 2))
    centre, scale = scores_N.mean(), scores_N.std() or 1.0
    x = (scores_N - centre) / scale

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = parameters[0] * x + parameters[1]
        error = expit(z) - target
        return float(np.mean(np.logaddexp(0, z) - target * z)), np.array([np.mean(error * x), np.mean(error)])

    slope, intercept = minimize(loss, np.zeros(2), jac=True, bounds=[(0, None), (None, None)], tol=1e-12).x
    return float(slope / scale), float(intercept - slope * centre / scale)
