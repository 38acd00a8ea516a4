"""Identification on the demo set, the threshold chosen on other identities; and rolling re-ID over its test people.

python benchmarks/open_set.py DEMO      (DEMO: the folder of `simclr demo`, or make demo DEMO_ARGS=--no-app)

The threshold is chosen on 60 of the 160 training identities enrolled and the other 100 as strangers. It is then used on the 60
test identities, enrolled, with their own probes (mated), with the same probes while their identity is left out, and with the
distractors (non-mated). "other cameras": enrolled by cameras 1 and 2, probes from 3 and 4. "all cameras": the first picture
of each track is the probe, the others are enrolled. Training saw the training identities' pictures, without their names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serve.bulk import embed_samples
from serve.encoder import Encoder, open_encoder
from serve.gallery import Gallery
from serve.identity.calibration import Calibration
from serve.identity.idf1 import idf1
from serve.identity.open_set import fpir, interval, tpir
from serve.identity.rolling import RollingReid
from serve.identity.tracks import follow, scored
from serve.identity.trials import choose_threshold, run_trials
from serve.samples import JUNK_IDENTITY, Sample
from serve.sources import open_source
from train.demo_data import DISTRACTOR_IDENTITY

ENROLLED = 60
FPIRS = (0.01, 0.1)


@dataclass(frozen=True)
class People:
    """Samples and their vectors (N, D)."""

    samples: list[Sample]
    vectors: NDArray[np.float32]

    def where(self, keep: Sequence[bool]) -> People:
        return People([sample for sample, kept in zip(self.samples, keep, strict=True) if kept], self.vectors[np.array(keep)])

    def of(self, identities: set[str]) -> People:
        return self.where([sample.identity in identities for sample in self.samples])

    def parts(self, scheme: str) -> tuple[People, People]:
        """What is enrolled, and the probes."""
        if scheme == "other cameras":
            enrolled = [sample.camera in ("1", "2") for sample in self.samples]
        else:
            first = {(s.identity, s.camera): s.source for s in sorted(self.samples, key=lambda s: -(s.time or 0))}
            enrolled = [first[s.identity, s.camera] != s.source for s in self.samples]
        return self.where(enrolled), self.where([not one for one in enrolled])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    demo = parser.parse_args().demo
    encoder, images = open_encoder(demo / "model_repository"), open_source(demo / "people")
    train, test = embedded(encoder, images.train), embedded(encoder, images.query + images.gallery)
    print(f"encoder {encoder.encoder_id}\n{'':32} FPIR asked        measured             TPIR")
    for scheme in ("other cameras", "all cameras"):
        for tracks in (False, True) if scheme == "other cameras" else (False,):
            for asked in FPIRS:
                chosen = calibrated(encoder, train, scheme, asked, tracks)
                print(f"{scheme + (', tracks' if tracks else ', single pictures'):32} {used(encoder, test, scheme, chosen)}")
    for asked in FPIRS:
        chosen = calibrated(encoder, train, "other cameras", asked, True)
        print(f"rolling, threshold {chosen.threshold:.4f} of FPIR {asked:.0%}: {rolled(test, chosen)}")


def embedded(encoder: Encoder, samples: Sequence[Sample]) -> People:
    """Every distractor is somebody else."""
    vectors, kept, _ = embed_samples(encoder, [s for s in samples if s.identity != JUNK_IDENTITY], "pictures")
    named = [replace(s, identity=f"distractor {i}") if s.identity == DISTRACTOR_IDENTITY else s for i, s in enumerate(kept)]
    return People(named, vectors)


def calibrated(encoder: Encoder, train: People, scheme: str, asked: float, tracks: bool) -> Calibration:
    identities = sorted({str(sample.identity) for sample in train.samples})
    enrolled, _ = train.of(set(identities[:ENROLLED])).parts(scheme)
    _, probes = train.parts(scheme)
    with tempfile.TemporaryDirectory() as folder, Gallery.open(folder, encoder, create=True) as gallery:
        gallery.add(enrolled.samples, enrolled.vectors)
        trials = run_trials(gallery, probes.samples, probes.vectors, tracks=tracks)
        return choose_threshold(gallery, trials, asked, tracks=tracks)


def used(encoder: Encoder, test: People, scheme: str, chosen: Calibration) -> str:
    enrolled, probes = test.where([not is_distractor(sample) for sample in test.samples]).parts(scheme)
    _, strangers = test.where([is_distractor(sample) for sample in test.samples]).parts(scheme)
    both = People(probes.samples + strangers.samples, np.concatenate([probes.vectors, strangers.vectors]))
    with tempfile.TemporaryDirectory() as folder, Gallery.open(folder, encoder, create=True) as gallery:
        gallery.add(enrolled.samples, enrolled.vectors)
        trials = run_trials(gallery, both.samples, both.vectors, tracks=chosen.tracks)
        left_out = run_trials(gallery, probes.samples, probes.vectors, tracks=chosen.tracks)
    top = np.concatenate([trials.top, left_out.top])
    false, true = fpir(top, chosen.threshold), tpir(trials.own, trials.rival, chosen.threshold)
    count = len({*trials.nonmated, *left_out.nonmated}), len(set(trials.mated))
    return f"{chosen.asked_fpir:>10.0%} {told(false, count[0]):>22} {told(true, count[1]):>24}"


def told(rate: float, identities: int) -> str:
    low, high = interval(rate, identities)
    return f"{rate:.1%} ({low:.1%} to {high:.1%})"


def is_distractor(sample: Sample) -> bool:
    return str(sample.identity).startswith("distractor")


def rolled(test: People, chosen: Calibration) -> str:
    """All pictures of the test people in the order of time; nobody is enrolled, and time is no help."""
    order = sorted(range(len(test.samples)), key=lambda i: test.samples[i].time or 0)
    order = [i for i in order if not is_distractor(test.samples[i])]
    crops = [replace(test.samples[i], track=test.samples[i].identity) for i in order]  # a tracker's id within its camera
    found = follow(RollingReid(threshold=chosen.threshold, dim=test.vectors.shape[1]), crops, test.vectors[order])
    figures = scored(crops, found)
    assert figures is not None
    alone = idf1([str(crop.identity) for crop in crops], [f"{crop.track} {crop.camera}" for crop in crops])
    last = {(one.camera, one.track): one.identity for one in found}
    return (
        f"IDF1 {figures[0]:.1%} online, {figures[1]:.1%} with the last word on each track; {alone:.1%} if every track were "
        f"somebody new; {len(last)} tracks, {len(set(last.values()))} identities for {len({crop.track for crop in crops})}"
    )


if __name__ == "__main__":
    main()
