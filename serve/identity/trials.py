"""Calibration probes put to a gallery, and the threshold chosen on what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import GalleryError, SourceError
from serve.files import atomic_path
from serve.filters import And, Condition, as_where
from serve.gallery import Gallery
from serve.identity.calibration import Calibration, Measured, Point, fit_logistic
from serve.identity.identify import enrolled_identities, rank_identities
from serve.identity.open_set import Curve, curve, fpir, interval, threshold_at, tpir
from serve.pooling import pool
from serve.samples import JUNK_IDENTITY, NOBODY, Sample

CURVE_AT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""FPIRs of the table."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Best scores of mated probes (M,) and of non-mated ones (N,); -inf where a filter leaves nobody."""

    own: NDArray[np.float64]
    rival: NDArray[np.float64]
    """(M,): the best of the other identities."""
    mated: tuple[str, ...]
    """(M,): who they are."""
    top: NDArray[np.float64]
    nonmated: tuple[str, ...]
    held_out: bool
    """Whether the non-mated probes are the mated ones, without what their own identities have in the gallery."""

    def curve(self) -> Curve:
        """Both rates at every threshold."""
        return curve(self.own, self.rival, self.top)


@dataclass(frozen=True, eq=False)
class _Probe:
    identity: str
    vector: NDArray[np.float32]
    sources: tuple[str, ...]


def run_trials(
    gallery: Gallery, samples: Sequence[Sample], vectors_ND: NDArray[np.float32], *, tracks: bool = False, where: str = ""
) -> Trials:
    """Search the gallery for every probe; a picture that is enrolled itself does not find itself.

    Args: tracks, whether pictures of one identity, camera and track are one probe. If every identity is enrolled, each is left
    out of the gallery in its turn, for its own probes. Raises: GalleryError, SourceError.
    """
    enrolled = enrolled_identities(gallery)
    if len(enrolled) < 2:
        raise GalleryError(f"{gallery.address}: {len(enrolled)} identities are enrolled, wanted 2 or more: simclr reid enrol")
    probes = _probes(samples, vectors_ND, tracks)
    own, rival = _scores(gallery, probes, enrolled, where)
    mated = np.array([probe.identity in enrolled for probe in probes])
    if not mated.any():
        raise SourceError(f"none of {len(probes)} probes is of an enrolled identity, so no TPIR can be told; add some that are")
    names, held_out = np.array([probe.identity for probe in probes]), bool(mated.all())
    nonmated = mated if held_out else ~mated
    return Trials(own[mated], rival[mated], tuple(names[mated]), rival[nonmated], tuple(names[nonmated]), held_out)


def choose_threshold(
    gallery: Gallery, trials: Trials, asked_fpir: float, *, tracks: bool = False, where: str = ""
) -> Calibration:
    """The lowest threshold whose FPIR on these trials is at most what is asked. Raises: GalleryError."""
    if not 0 < asked_fpir < 1:
        raise GalleryError(f"calibrate: FPIR is {asked_fpir}, wanted more than 0 and less than 1")
    threshold = _threshold(trials, asked_fpir)
    slope, intercept = _fit_probability(trials)
    return Calibration(
        format="simclr-threshold-1",
        encoder_id=gallery.encoder_id,
        metric="cosine",
        asked_fpir=asked_fpir,
        threshold=threshold,
        slope=slope,
        intercept=intercept,
        identities=len(enrolled_identities(gallery)),
        where=where,
        tracks=tracks,
        held_out=trials.held_out,
        fpir=_measured(fpir(trials.top, threshold), trials.nonmated),
        tpir=_measured(tpir(trials.own, trials.rival, threshold), trials.mated),
        curve=tuple(_point(trials, _threshold(trials, rate)) for rate in CURVE_AT),
    )


def _probes(samples: Sequence[Sample], vectors_ND: NDArray[np.float32], tracks: bool) -> list[_Probe]:
    """Junk is left out. Raises: SourceError for a probe of whom nobody says who it is."""
    groups: dict[tuple[str | None, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        identity = sample.identity or sample.label
        if identity is None:
            raise SourceError(
                f"{sample.source}: a probe without identity; name it (sub-folder or column), strangers by any name not enrolled"
            )
        if identity != JUNK_IDENTITY:
            together = tracks and identity not in NOBODY  # of whom each is somebody else
            groups.setdefault((identity, sample.camera, sample.track) if together else (identity, str(place)), []).append(place)
    return [
        _Probe(str(identity), pool(vectors_ND[places]), tuple(samples[place].source for place in places))
        for (identity, *_), places in groups.items()
    ]


def _scores(
    gallery: Gallery, probes: Sequence[_Probe], enrolled: set[str], where: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of every probe the best score of its own identity and of the others; -inf where there is none."""
    among = as_where(where)
    sources = tuple(source for probe in probes for source in probe.sources)
    ids = {item.source: item.id for item in gallery.items(Condition("source", "in", sources))}
    found = np.full((2, len(probes)), -np.inf)
    for place, probe in enumerate(probes):
        itself = [ids[source] for source in probe.sources if source in ids]
        others = [hit for hit in rank_identities(gallery, probe.vector, 2, among, itself) if hit.identity != probe.identity]
        found[1, place] = max((hit.score for hit in others), default=-np.inf)
        if probe.identity in enrolled:
            mates = And((Condition("identity", "=", (probe.identity,)), among))
            found[0, place] = max((hit.score for hit in gallery.search(probe.vector, 1, mates, itself)), default=-np.inf)
    return found[0], found[1]


def _threshold(trials: Trials, rate: float) -> float:
    return max(-1.0, threshold_at(trials.top, rate))  # -1 where a filter left some probe nobody


def _point(trials: Trials, threshold: float) -> Point:
    rates = fpir(trials.top, threshold), tpir(trials.own, trials.rival, threshold)
    return Point(threshold=threshold, fpir=rates[0], tpir=rates[1])


def _measured(rate: float, identities: Sequence[str]) -> Measured:
    count = len(set(identities))
    low, high = interval(rate, count)
    return Measured(rate=rate, low=low, high=high, probes=len(identities), identities=count)


def _fit_probability(trials: Trials) -> tuple[float, float]:
    """On the best score of every probe: right if it is the own identity's."""
    scores = np.concatenate([np.maximum(trials.own, trials.rival), trials.top])
    right = np.concatenate([trials.own > trials.rival, np.zeros(len(trials.top), bool)])
    answered = np.isfinite(scores)
    if not answered.any():
        raise GalleryError("calibrate: the filter leaves nobody for any probe; wanted a wider --where")
    return fit_logistic(scores[answered], right[answered])


def draw(trials: Trials, calibration: Calibration, path: Path) -> None:
    """TPIR against FPIR as a PNG, with what was chosen and its intervals."""
    from matplotlib.figure import Figure  # heavy, and only asked for now and then

    whole, chosen = trials.curve(), calibration
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.step(whole.fpir, whole.tpir, where="post", linewidth=1)
    x, y = ([[one.rate - one.low], [one.high - one.rate]] for one in (chosen.fpir, chosen.tpir))
    axes.errorbar([chosen.fpir.rate], [chosen.tpir.rate], xerr=x, yerr=y, fmt="k.", capsize=3)
    axes.axvline(chosen.asked_fpir, color="grey", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="FPIR: strangers named", ylabel="TPIR: known and named rightly")
    axes.set_xscale("symlog", linthresh=1 / len(trials.top))
    axes.set_title(
        f"threshold {chosen.threshold:.4f}; {chosen.fpir.probes} non-mated probes of {chosen.fpir.identities} identities, "
        f"{chosen.tpir.probes} mated of {chosen.tpir.identities}",
        fontsize="small",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
